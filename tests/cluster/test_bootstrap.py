"""Where a launch finds its place: every launcher's variables, and every way in which they can contradict themselves."""

import pytest

from novajax.cluster.bootstrap import PlaceFlags, expand_nodelist, find_group, read_secret
from novajax.cluster.settings import Place
from novajax.core.errors import ConfigError

LWS = {"LWS_LEADER_ADDRESS": "nova-0.nova.default", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "2"}
JOBSET = {"JOB_COMPLETION_INDEX": "1", "JOBSET_COORDINATOR": "nova-workers-0-0.nova", "JOBSET_PROCESS_COUNT": "2"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "gpu[007-009,12],login", "SLURM_JOB_ID": "71234"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
FLAGS = PlaceFlags(process_id=1, process_count=3, coordinator="head:900")


@pytest.mark.parametrize(
    ("environment", "flags", "place"),
    [
        ({}, PlaceFlags(), Place()),
        ({}, FLAGS, Place(index=1, count=3, coordinator="head:900", source="flags")),
        (LWS, PlaceFlags(), Place(index=2, count=4, coordinator="nova-0.nova.default:7791", source="LeaderWorkerSet")),
        (LWS | SLURM, PlaceFlags(), Place(index=2, count=4, coordinator="nova-0.nova.default:7791", source="LeaderWorkerSet")),
        (LWS, FLAGS, Place(index=1, count=3, coordinator="head:900", source="flags")),
        (JOBSET, PlaceFlags(), Place(index=1, count=2, coordinator="nova-workers-0-0.nova:7791", source="JobSet")),
        (
            {"JOB_COMPLETION_INDEX": "1"},
            PlaceFlags(process_count=2, coordinator="a:1"),
            Place(index=1, count=2, coordinator="a:1", source="Kubernetes Job"),
        ),
        (SLURM, PlaceFlags(), Place(index=3, count=4, coordinator="gpu007:21234", source="Slurm")),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, PlaceFlags(), Place(source="Slurm")),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[9-10]"},
            PlaceFlags(),
            Place(index=1, count=2, coordinator="n9:20000", source="Slurm"),
        ),
        (MPI, PlaceFlags(coordinator="[::1]:5"), Place(index=1, count=2, coordinator="[::1]:5", source="Open MPI")),
        (MPI, PlaceFlags(coordinator="fd00::1"), Place(index=1, count=2, coordinator="[fd00::1]:7791", source="Open MPI")),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, PlaceFlags(), Place(source="Open MPI")),
    ],
)
def test_a_place_is_found(environment: dict[str, str], flags: PlaceFlags, place: Place):
    assert find_group(environment, flags) == place


@pytest.mark.parametrize(
    ("environment", "flags", "words"),
    [
        (LWS | {"LWS_WORKER_INDEX": "4"}, PlaceFlags(), "process 4 of 4"),
        (LWS | {"LWS_GROUP_SIZE": "many"}, PlaceFlags(), "LWS_GROUP_SIZE='many'"),
        (LWS, PlaceFlags(process_id=3), "contradicts LeaderWorkerSet, which says 2"),
        (SLURM, PlaceFlags(process_count=8), "--process_count=8 contradicts Slurm, which says 4"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[9-7]"}, PlaceFlags(), "9-7"),
        ({"JOB_COMPLETION_INDEX": "1"}, PlaceFlags(), "--process_count is missing"),
        (MPI, PlaceFlags(), "--coordinator"),
        (MPI, PlaceFlags(coordinator="head:99999"), "host:port"),
        ({}, PlaceFlags(process_id=1), "--process_count is missing"),
        ({}, PlaceFlags(coordinator="head:1"), "without --process_id"),
        ({}, PlaceFlags(process_id=3, process_count=2, coordinator="a:1"), "process 3 of 2"),
        ({}, PlaceFlags(process_id=0, process_count=99999, coordinator="a:1"), "limit"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(environment: dict[str, str], flags: PlaceFlags, words: str):
    with pytest.raises(ConfigError) as caught:
        find_group(environment, flags)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node[001-003,7]", ["node001", "node002", "node003", "node7"]),
        ("a,b", ["a", "b"]),
        ("gpu[9-11],x[1-2]-ib", ["gpu9", "gpu10", "gpu11", "x1-ib", "x2-ib"]),
        ("r[1-2]n[3,4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("lone", ["lone"]),
    ],
)
def test_node_lists_expand(text: str, names: list[str]):
    assert expand_nodelist(text) == names


@pytest.mark.parametrize("text", ["", "a[", "a[]", "a[1-]", "a[1-99999999]", "a]b", "a[x]"])
def test_node_lists_that_make_no_sense_are_refused(text: str):
    with pytest.raises(ConfigError):
        expand_nodelist(text)


def test_a_secret_is_wanted_and_not_a_short_one(tmp_path):
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef\n")
    assert read_secret(str(file), {}) == b"0123456789abcdef"
    assert read_secret(None, {"NOVAJAX_SECRET": "x" * 20}) == b"x" * 20
    for path, environment in ((None, {}), (None, {"NOVAJAX_SECRET": "short"}), (str(tmp_path / "none"), {})):
        with pytest.raises(ConfigError, match="secret"):
            read_secret(path, environment)
