"""`python -m novajax.quantize` as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "checkpoints" / "nova-draft"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "novajax.quantize", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=300)


def test_two_devices_choose_a_map_and_seal_it(tmp_path: Path):
    output, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text("utf-8"), "utf-8")
    flags = [
        "--budget_share=0.25",
        "--rows=8",
        "--batch_rows=2",
        "--sensitivity_rows=2",
        "--row_tokens=64",
        "--sensitivity=estimated",
        "--tune_steps=2",
    ]
    flags += ["--formats=int8,int4-32"]
    done = run(f"--model={MODEL}", f"--text={text}", f"--output={output}", "--mesh=tensor=2", "--nocompare", "--quiet", "--json", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["maps"][0]["share"] <= 0.25
    assert {path.name for path in output.iterdir()} >= {"profile.json", "report.json", "report.html", "config.json"}
    assert json.loads((output / "report.json").read_text()) == report


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text=a"], "--model, --text and --output are needed"),
        (["--text=a", "--output=b"], "one of --budget_bytes, --budget_share and --max_loss"),
        (["--text=a", "--output=b", "--budget_share=0.3", "--mesh=data=2"], "only tensor cuts a model"),
    ],
)
def test_what_it_cannot_do_is_refused_in_words(flags: list[str], message: str):
    done = run(f"--model={MODEL}", *flags)
    assert done.returncode == 1
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
