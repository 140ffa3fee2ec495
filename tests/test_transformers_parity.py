"""The loaders against transformers with PyTorch: equal logits and equal greedy decoding.

Skipped where those are not installed; `pip install '.[test,parity]'` installs them.
"""

import pathlib
import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests import checkpoints  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import bert  # noqa: E402
import decoder  # noqa: E402
import glue  # noqa: E402
import llama  # noqa: E402

TOKENS = np.random.default_rng(3).integers(0, 256, (2, 90))


def assert_equal_logits(model, folder):
    config, params, _ = decoder.load_checkpoint(folder)
    graphdef, _ = llama.abstract(config)
    found = jax.jit(lambda params, tokens: llama.logits(graphdef, params, tokens))(params, TOKENS)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    return config, params


def read_by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", list(checkpoints.DECODERS))
def test_decoders(tmp_path, kind, shards):
    folder = checkpoints.write_decoder(tmp_path, shards=shards, **checkpoints.DECODERS[kind])
    model = read_by_transformers(folder)
    config, params = assert_equal_logits(model, folder)

    prompts, lengths, count = TOKENS[:, :11], np.array([5, 11]), 20
    ends = (checkpoints.END_ID,)
    found = np.asarray(decoder.greedy_of(config, count, ends)(params, prompts, lengths))
    for row, prompt, length in zip(found, prompts, lengths, strict=True):
        whole = model.generate(
            torch.tensor(prompt[None, :length]),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=checkpoints.END_ID,
            pad_token_id=checkpoints.END_ID,
        )
        new = whole[0, length:].tolist()
        assert row.tolist() == new + [checkpoints.END_ID] * (count - len(new))


@pytest.mark.parametrize("kind", ["llama 3.2", "qwen2"])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_files_that_transformers_wrote(tmp_path, kind, shard_size):
    """Its config.json has other keys than those of older files, and it cuts its own shards."""
    (tmp_path / "ours").mkdir()
    ours = checkpoints.write_decoder(tmp_path / "ours", **checkpoints.DECODERS[kind])
    model = read_by_transformers(ours)
    theirs = tmp_path / "theirs"
    model.save_pretrained(theirs, max_shard_size=shard_size)
    (theirs / "tokenizer.json").write_bytes((ours / "tokenizer.json").read_bytes())
    assert (len(list(theirs.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    assert_equal_logits(model, theirs)


def test_bfloat16_files(tmp_path):
    (tmp_path / "ours").mkdir()
    ours = checkpoints.write_decoder(tmp_path / "ours")
    theirs = tmp_path / "theirs"
    read_by_transformers(ours).to(torch.bfloat16).save_pretrained(theirs)
    (theirs / "tokenizer.json").write_bytes((ours / "tokenizer.json").read_bytes())
    assert_equal_logits(read_by_transformers(theirs), theirs)


def test_tokenizers_give_equal_tokens(tmp_path):
    folder = checkpoints.write_decoder(tmp_path)
    _, _, tokenizer = decoder.load_checkpoint(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    text = "Question: 2 + 3 × 4?\nAnswer: naïve 😀"
    assert tokenizer.encode(text).ids == theirs(text)["input_ids"]


def test_bert(tmp_path):
    folder = checkpoints.write_bert(tmp_path)
    config, params, tokenizer = bert.load_checkpoint(folder, num_labels=2, seed=0)
    examples = [
        glue.Example(("the cat sat on the mat .", "a cat sat ."), 0),
        glue.Example(("a dog", "a cat ran"), 1),
    ]
    batch = glue.tokenize(tokenizer, examples, max_len=16)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {key: torch.tensor(value) for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        states = model(**{k: v.long() for k, v in inputs.items()}).last_hidden_state.numpy()
    mask = batch["attention_mask"][..., None]
    pooled = (states * mask).sum(1) / mask.sum(1)
    head = params["head"]
    expected = pooled @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(
        jax.jit(bert.embeddings_of(config))(params, batch), pooled, atol=1e-4
    )
    np.testing.assert_allclose(jax.jit(bert.logits_of(config))(params, batch), expected, atol=1e-4)
