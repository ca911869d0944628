"""The decoder against Hugging Face transformers: same logits to 1e-4 in float32, same greedy tokens, dense and cached.

The nano checkpoints and what transformers answered are committed (make_nano_checkpoints.py); the live comparison draws
fresh weights and runs where torch and transformers are installed. Real models: the small ones beside the repository.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from nano import NANO, Loaded, nano_names

SHARED = Path(os.environ.get("NOVAJAX_SHARED", str(Path(__file__).parents[2].parent / "shared")))


def assert_parity(directory: Path, expected: dict[str, np.ndarray]) -> None:
    model = Loaded(directory)
    prompt, wanted = expected["prompt"], expected["greedy"].tolist()
    logits = model.logits(np.concatenate([prompt, expected["greedy"][:-1]]))
    np.testing.assert_allclose(logits[: len(prompt)], expected["logits"], rtol=0, atol=1e-4)
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == wanted
    assert model.greedy(prompt, len(wanted)) == wanted


@pytest.mark.parametrize("name", nano_names())
def test_nano_checkpoint_equals_transformers(name: str):
    with np.load(NANO / name / "expected.npz") as expected:
        assert_parity(NANO / name, dict(expected))


def test_every_case_of_the_script_is_committed():
    from make_nano_checkpoints import CASES

    assert set(nano_names()) == set(CASES)


@pytest.mark.parametrize("name", nano_names())
def test_live_comparison(name: str, tmp_path: Path):
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    import make_nano_checkpoints

    seed = int.from_bytes(os.urandom(3)) + 10**6
    print(f"seed {seed}")
    model = make_nano_checkpoints.build(name, seed)
    prompt = np.random.default_rng(seed).integers(3, model.config.vocab_size, 40)
    expected = make_nano_checkpoints.expect(model, prompt, 12)
    model.save_pretrained(tmp_path)
    if expected["gap"] < 1e-3:
        pytest.skip(f"seed {seed} drew a near tie, gap {expected['gap']:.1e}")
    assert_parity(tmp_path, expected)


@pytest.mark.parametrize(("directory", "key"), [("stories260k", "stories260K"), ("llama2xs", "llama2xs")])
def test_real_model_goldens(directory: str, key: str):
    goldens = SHARED / "models" / "goldens.json"
    if not goldens.exists():
        pytest.skip(f"{goldens.name} is not beside the repository (NOVAJAX_SHARED)")
    model = Loaded(SHARED / "models" / directory)
    for example in json.loads(goldens.read_text())[key]["greedy"]:
        prompt, wanted = example["prompt_ids"], example["output_ids"]
        clear = np.array(example["top1_top2_gap"])[: len(wanted)] > 1e-3  # the gaps include the end token's
        row = np.zeros(128, np.int32)  # one length for every example: one compile
        row[: len(prompt + wanted)] = prompt + wanted
        logits = model.logits(row)[len(prompt) - 1 :][: len(wanted)]
        assert (logits.argmax(-1) == wanted)[clear].all()
        for token, value in example["first_top8"]:
            assert logits[0, token] == pytest.approx(value, abs=1e-4)
