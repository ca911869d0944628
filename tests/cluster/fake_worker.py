"""A rank of a group whose engine is `cluster.fake`: --step_s, and --wrong=RANK:STEP:WHAT in the first epoch."""

from absl import app, flags

from novajax.cluster import rank
from novajax.cluster.fake import FakeBuilder, Misbehaviour
from novajax.telemetry.logging import configure

_REPORTS = flags.DEFINE_integer("report_fd", None, "")
_STEP_S = flags.DEFINE_float("step_s", 0.005, "")
_START_S = flags.DEFINE_float("start_s", 0.0, "")
_WRONG = flags.DEFINE_string("wrong", "", "")


def main(_: list[str]) -> int:
    configure()
    told = (_WRONG.value or "-1:0:").split(":")
    wrong = Misbehaviour(int(told[0]), int(told[1]), told[2])
    return rank.run(FakeBuilder(step_s=_STEP_S.value, start_s=_START_S.value, misbehaviour=wrong), _REPORTS.value)


if __name__ == "__main__":
    app.run(main)
