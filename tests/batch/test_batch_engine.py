"""The program with the real engine and a trained model, killed in the middle: the second run finishes what the first did not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("NOVAJAX_SHARED", ROOT.parent / "shared")) / "models" / "stories260k"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_batch_is_finished_by_the_second_run_and_greedy_answers_agree(tmp_path):
    if not MODEL.is_dir():
        pytest.skip("the shared model stories260k is not here (set NOVAJAX_SHARED)")
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = {"prompt": "Once upon a time", "temperature": 0}
    source.write_text("".join(json.dumps(asked | {"max_tokens": 8 + i % 40}) + "\n" for i in range(120)))
    command = [sys.executable, "-m", "novajax.batch", f"--model={MODEL}", f"--input={source}", f"--output={output}"]
    command += ["--max_rows=4", "--max_context_tokens=256", f"--compile_cache={tmp_path / 'compiled'}", "--json"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (output.exists() and output.stat().st_size > 5000):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert second.returncode == 0, second.stderr
    summary = json.loads(second.stdout)
    assert summary["resumed"] > 0
    assert summary["resumed"] + summary["succeeded"] == 120
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(record["line"] for record in records) == list(range(1, 121))
    texts = {record["response"]["body"]["choices"][0]["text"] for record in records}
    longest = max(texts, key=len)
    assert all(longest.startswith(text) for text in texts)
