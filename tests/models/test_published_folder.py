"""A published folder, whose tokenizer files name transformers' Llama class, and checkpoints that torch shards."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoTokenizer, pipeline

from pldr_train.cli import main
from pldr_train.errors import CheckpointError, DataError
from pldr_train.model import PldrllmTokenizer, PldrllmTokenizerFast
from pldr_train.model.sentencepiece_text import SPECIAL_PIECES
from pldr_train.models.extract_g import load_tokenizer_of
from pldr_train.models.importing import import_model
from pldr_train.models.loading import load_model
from tests.conftest import Golden
from tests.models.conftest import PROMPT, Trained
from tests.parity.tolerances import assert_tensors_close

TEXTS = [
    "The metric  tensor ﬁeld ½ learns", "  a tensor that", "data\tloss e\u0301", "heads\u00a0and lanes  ",
    "１２３ steps", "the [SEP] metric", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def published(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's model as the published ones lie on the Hub: saved by transformers 4 as a Llama tokenizer."""
    folder = tmp_path_factory.mktemp("published") / "model"
    model = load_model(trained.run)
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((trained.run / "tokenizer.model").read_bytes())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    scored = [(pieces.id_to_piece(index), pieces.get_score(index)) for index in range(pieces.get_piece_size())]
    backend = Tokenizer(models.Unigram(scored, unk_id=1, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="[START]:0 $A:0", pair="[START]:0 $A:0 [START]:1 $B:1", special_tokens=[("[START]", 2)]
    )
    backend.save(str(folder / "tokenizer.json"))
    special = {"content": "", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "tokenizer_class": "LlamaTokenizerFast", "legacy": False, "add_bos_token": True, "add_eos_token": False,
        "padding_side": "left", "model_max_length": 1e30, "clean_up_tokenization_spaces": False, **SPECIAL_PIECES,
        "added_tokens_decoder": {
            str(index): special | {"content": piece, "special": True}
            for index, piece in enumerate(SPECIAL_PIECES.values())
        },
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def assert_right_ids(tokenizer: Any, trained: Trained) -> None:
    expected = PldrllmTokenizer(str(trained.run / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"], text


def test_a_published_folder_gets_the_right_tokenizer_everywhere(
    published: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Tokenizer.from_file(str(published / "tokenizer.json"))
    assert wrong.encode(TEXTS[0], add_special_tokens=False).ids != PldrllmTokenizer(
        str(published / "tokenizer.model")
    ).encode(TEXTS[0])
    tokenizer = AutoTokenizer.from_pretrained(published)
    assert type(tokenizer) is PldrllmTokenizerFast
    assert tokenizer.padding_side == "left"
    assert_right_ids(tokenizer, trained)
    assert_right_ids(pipeline("text-generation", model=str(published)).tokenizer, trained)
    assert_right_ids(load_tokenizer_of(published), trained)
    assert main(["generate", str(published), PROMPT, "--max-new-tokens", "4", "--temperature", "0"]) == 0
    mine = capsys.readouterr().out
    assert main(["generate", str(trained.run), PROMPT, "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert mine == capsys.readouterr().out


def test_a_published_folder_becomes_one_of_ours(published: Path, trained: Trained, tmp_path: Path) -> None:
    assert main(["import", str(published), str(tmp_path / "ours")]) == 0
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", published))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())["tokenizer_class"].startswith(
        "Pldrllm"
    )
    assert_right_ids(AutoTokenizer.from_pretrained(tmp_path / "ours"), trained)
    assert main(["import", str(published), str(tmp_path / "other"), "--context-length", "9"]) == 2


def test_a_published_folder_without_its_sentencepiece_model_is_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    for file in published.iterdir():
        if file.name != "tokenizer.model":
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"tokenizer.json was written by another .*put the SentencePiece"):
        AutoTokenizer.from_pretrained(folder)
    with pytest.raises(DataError, match=r"its tokenizer cannot be loaded: .*put the SentencePiece tokenizer.model"):
        load_tokenizer_of(folder)
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 2
    assert "has no tokenizer.model, and a tokenizer.json of another class gives other" in capsys.readouterr().err
    given = ["--tokenizer", str(published / "tokenizer.model")]
    assert main(["import", str(folder), str(tmp_path / "ours"), *given]) == 0


# Checkpoints of torch.distributed.checkpoint


def write_dcp(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint as torch's own recipe for training writes it: model and optimizer below "app"."""
    moments = {f"state.{name}.exp_avg": torch.zeros_like(value) for name, value in weights.items()}
    dcp.save({"app": {"model": weights, "optim": moments, "epoch": 3}}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("prefix", ["", "module."])
def test_sharded_checkpoints_give_the_golden_logits(golden: Golden, tmp_path: Path, prefix: str) -> None:
    weights = {prefix + name: tensor for name, tensor in golden.group("weights").items()}
    source = write_dcp(tmp_path / "dcp", weights)
    dcp_to_torch_save(source, tmp_path / "whole.pth")
    for index, each in enumerate((source, tmp_path / "whole.pth")):
        assert main(["import", str(each), str(tmp_path / f"model{index}"), "--context-length", "64"]) == 0
        model = load_model(tmp_path / f"model{index}")
        assert_tensors_close({"logits": model(golden["input_ids"][:, :-1]).logits}, {"logits": golden["logits"]})


def test_a_tensor_in_several_chunks_is_put_together(tmp_path: Path, golden: Golden) -> None:
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    weights = golden.group("weights")
    source = write_dcp(tmp_path / "dcp", weights)
    # Cut the embedding in two along its rows, as two processes would have written it.
    metadata = pickle.loads((source / ".metadata").read_bytes())
    name = "app.model.decoder.embedding.weight"
    whole, half = weights["decoder.embedding.weight"], weights["decoder.embedding.weight"].shape[0] // 2
    entry: TensorStorageMetadata = metadata.state_dict_metadata[name]
    place = metadata.storage_data.pop(MetadataIndex(name, (0, 0)))
    for index, (start, part) in enumerate(((0, whole[:half]), (half, whole[half:]))):
        file = source / f"__{index + 1}_0.distcp"
        torch.save(part.clone(), file)
        chunk = type(place)(relative_path=file.name, offset=0, length=file.stat().st_size)
        metadata.storage_data[MetadataIndex(name, (start, 0))] = chunk
    entry.chunks[:] = []
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    import_model(source, tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in weights.items())
    (source / "__2_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__2_0.distcp: app.model.decoder.embedding.weight cannot be read"):
        import_model(source, tmp_path / "other")


class Runs:
    """What pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_hostile_sharded_checkpoints_are_refused_and_never_run(golden: Golden, tmp_path: Path) -> None:
    source = write_dcp(tmp_path / "dcp", golden.group("weights"))
    canary, metadata = tmp_path / "canary", source / ".metadata"
    good = metadata.read_bytes()
    for hostile in (Runs(os.system, f"touch {canary}"), {"a": Runs(os.system, f"touch {canary}")}, [1], None):
        metadata.write_bytes(pickle.dumps(hostile))
        with pytest.raises(CheckpointError, match=r"\.metadata describes no checkpoint of tensors"):
            import_model(source, tmp_path / "model")
    metadata.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match=r"\.metadata is no whole pickle"):
        import_model(source, tmp_path / "model")
    metadata.write_bytes(good)
    chunks = source / "__0_0.distcp"
    whole = chunks.read_bytes()
    chunks.write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: app.model.* cannot be read|its tensors take .* bytes"):
        import_model(source, tmp_path / "model")
    described = pickle.loads(good)
    described.state_dict_metadata["app.model.decoder.embedding.weight"].size = torch.Size([2**40, 4])
    metadata.write_bytes(pickle.dumps(described))
    with pytest.raises(CheckpointError, match=r"its tensors take .* bytes, and its files have"):
        import_model(source, tmp_path / "model")
    metadata.write_bytes(good)
    chunks.write_bytes(whole.replace(b"torch._utils", b"torch._evils"))
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is refused: .*Nothing was executed"):
        import_model(source, tmp_path / "model")
    assert not canary.exists()
    assert not (tmp_path / "model").exists()
    dcp.save({"other": torch.ones(2)}, checkpoint_id=tmp_path / "else", no_dist=True)
    with pytest.raises(CheckpointError, match=r"no tensor 'decoder.embedding.weight' among its 1, such as \['other'\]"):
        import_model(tmp_path / "else", tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is a folder without \.metadata and config.json"):
        main_raises(tmp_path / "empty", tmp_path / "model")


def main_raises(source: Path, target: Path) -> None:
    from pldr_train.commands import import_

    import_.run(import_.build_parser().parse_args([str(source), str(target)]))
