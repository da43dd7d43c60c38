"""Special tokens of a source survive import, generate, lens and export; tokens and weights in unusual places."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from data_prep.special_tokens import KEPT_AS, SpecialTokens
from data_prep.tokenizer_spec import TokenizerSpec
from pretrain.checks import check_job
from pretrain.commands.hf import export_model, import_model
from pretrain.commands.lens_show import open_source
from pretrain.compose import freeze
from pretrain.config.data import DataConfig
from pretrain.config.generation import GenerateConfig
from pretrain.data import open_data
from pretrain.generation import generate
from pretrain.interop.folder import HFModel
from pretrain.lens.command import LensConfig
from pretrain.vocab import VocabParallelEmbedding
from tests.data_prep.commands import small_spec
from tests.pretrain.interop import models
from tests.pretrain.tiny import tiny_config, write_tokens

CPU = torch.device("cpu")
BOS, TURN, END = 260, 261, 259
NAMES = {"<|begin_of_text|>": BOS, "<|eot_id|>": TURN, "<|end_of_text|>": END}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def rewrite(path: Path, **changes: object) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def add_tokens(folder: Path, names: dict[str, int]) -> None:
    by_id = sorted(names.items(), key=lambda item: item[1])
    rewrite(folder / "tokenizer.json", added_tokens=[{"id": id, "content": n, **FLAGS} for n, id in by_id])


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> Path:
    """A Llama with three special tokens, as in Llama 3: start of text, end of turn and end of text."""
    spec = small_spec()
    wide = TokenizerSpec(spec.name, spec.pattern, spec.special_tokens | {"<|a|>": BOS, "<|b|>": TURN}, spec.ranks)
    folder = models.save(tmp_path_factory.mktemp("llama3") / "source", "llama tied", spec=wide)
    add_tokens(folder, NAMES)
    bos = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    known = {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [BOS], "tokens": ["<|begin_of_text|>"]}}
    template = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, text], "special_tokens": known}
    rewrite(folder / "tokenizer.json", post_processor={"type": "Sequence", "processors": [template]})
    ids = {"bos_token_id": BOS, "eos_token_id": [END, TURN], "pad_token_id": TURN}
    for name in ("config.json", "generation_config.json"):
        rewrite(folder / name, **ids)
    rewrite(folder / "tokenizer_config.json", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    return folder


def test_bos_eos_and_pad_survive_import_and_export(llama3, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    list(import_model([f"hf={llama3}", f"run={run}"]))
    list(export_model([f"run={run}", f"out={out}"]))
    for auto in ("AutoConfig", "GenerationConfig"):
        before, after = (getattr(models.transformers, auto).from_pretrained(path) for path in (llama3, out))
        assert (after.bos_token_id, after.eos_token_id, after.pad_token_id) == (BOS, [END, TURN], TURN)
        assert (before.bos_token_id, before.eos_token_id, before.pad_token_id) == (BOS, [END, TURN], TURN)
    before, after = (models.transformers.AutoTokenizer.from_pretrained(path) for path in (llama3, out))
    names = ("<|begin_of_text|>", "<|eot_id|>")
    assert (after.bos_token, after.eos_token) == (before.bos_token, before.eos_token) == names
    assert after.pad_token is before.pad_token is None
    text = "the lost theory<|end_of_text|>x"
    assert after(text).input_ids == before(text).input_ids and after(text).input_ids[0] == BOS
    again = tmp_path / "again"
    list(import_model([f"hf={out}", f"run={again}"]))
    assert SpecialTokens.of_run(again) == SpecialTokens.of_run(run)


def test_ids_come_from_config_without_tokenizer_config(llama3, tmp_path):
    folder = copied(llama3, tmp_path / "bare")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    list(import_model([f"hf={folder}", f"run={tmp_path / 'run'}"]))
    list(export_model([f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]))
    tokenizer = models.transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, END, TURN)


def test_lens_and_generate_start_with_bos_and_stop_at_any_eos(llama3, tmp_path, monkeypatch):
    run = tmp_path / "run"
    list(import_model([f"hf={llama3}", f"run={run}"]))
    for given in ({"hf": str(llama3)}, {"run": str(run)}):
        source = open_source(LensConfig(text="the", **given), CPU)
        assert source.encode("the")[0] == BOS
    real = VocabParallelEmbedding.lookup
    for end in (END, TURN):
        seen = []
        drawn = iter([5, end, 7])

        def sample(*args: object, drawn=drawn, **kwargs: object) -> torch.Tensor:
            return torch.tensor([next(drawn)])

        def recorded(self, ids, *plan, seen=seen, **options):
            seen.append(ids.flatten().tolist())
            return real(self, ids, *plan, **options)

        with monkeypatch.context() as patch:
            patch.setattr("pretrain.decoding.sample", sample)
            patch.setattr(VocabParallelEmbedding, "lookup", recorded)
            list(generate(GenerateConfig(run=str(run), prompt="the", tokens=3), CPU))
        assert seen[0][0] == BOS and seen[1:] == [[5]]


def test_class_default_that_is_ordinary_token_is_not_bos(llama3, tmp_path):
    """Keeps the class defaults 1 and 2 in config.json, which are bytes of this tokenizer."""
    folder = copied(llama3, tmp_path / "stale")
    for name in ("config.json", "generation_config.json"):
        rewrite(folder / name, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    found = SpecialTokens.read(folder)
    assert found.bos == BOS and found.ends == [TURN]
    assert SpecialTokens().begin(small_spec()) == END and SpecialTokens().stops(small_spec()) == {END}


def copied(source: Path, to: Path) -> Path:
    to.mkdir()
    for path in source.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def config_of(folder: Path, run: Path, tokens: Path):
    found = HFModel(folder)
    config = tiny_config(tokens, run, model=asdict(found.model), vocab__size=found.vocab_size, vocab__tie=found.tie)
    config.init_from = f"hf:{folder}"
    return config


def test_run_keeps_special_tokens_of_its_source(llama3, tmp_path):
    write_tokens(tmp_path / "tokens", 262)
    config = config_of(llama3, tmp_path / "run", tmp_path / "tokens")
    data = open_data(DataConfig(path=str(tmp_path / "tokens")))
    freeze(config, data)
    assert SpecialTokens.of_run(tmp_path / "run").bos == BOS
    config.init_from = None
    freeze(config, data)  # not trained yet, so it starts from scratch
    assert not (tmp_path / "run" / KEPT_AS).exists() and SpecialTokens.of_run(tmp_path / "run") == SpecialTokens()


def test_incomparable_tokenizer_warns(llama3, tmp_path):
    folder, lines = copied(llama3, tmp_path / "sentencepiece"), []
    rewrite(folder / "tokenizer.json", pre_tokenizer={"type": "Metaspace"})
    write_tokens(tmp_path / "tokens", 262)
    config = config_of(folder, tmp_path / "run", tmp_path / "tokens")
    check_job(config, 1, "cpu", warn=lines.append)
    assert len(lines) == 1 and f"init_from=hf:{folder}: its tokenizer cannot be compared with the data's" in lines[0]
    list(import_model([f"hf={folder}", f"run={tmp_path / 'imported'}", "vocab.multiple=8"]))
    config.run.dir, config.init_from, lines[:] = str(tmp_path / "imported"), None, []
    check_job(config, 1, "cpu", warn=lines.append)
    assert len(lines) == 1 and "was imported without a tokenizer" in lines[0]


def test_one_unused_token_without_row_is_left_out(llama3, tmp_path):
    folder = copied(llama3, tmp_path / "padded")
    add_tokens(folder, NAMES | {"[PAD]": 262})
    rewrite(folder / "tokenizer_config.json", pad_token="[PAD]")
    lines = list(import_model([f"hf={folder}", f"run={tmp_path / 'run'}"]))
    assert "without [PAD], id 262" in lines[-1] and "262 ids" in lines[-1]
    list(export_model([f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]))
    assert len(models.transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 262
    add_tokens(folder, NAMES | {"[PAD]": 262, "[MASK]": 263})
    with pytest.raises(ValueError, match=r"its matrix 262: \[PAD\], \[MASK\]: add rows to the matrix"):
        list(import_model([f"hf={folder}", f"run={tmp_path / 'run2'}"]))
    add_tokens(folder, NAMES | {"<|im_end|>": 262})
    rewrite(folder / "tokenizer_config.json", eos_token="<|im_end|>", pad_token=None)
    with pytest.raises(ValueError, match=r"its matrix 262: <\|im_end\|>: add rows"):
        list(import_model([f"hf={folder}", f"run={tmp_path / 'run2'}"]))


@pytest.mark.parametrize("kind", ["gpt2 tied", "llama tied"])
@pytest.mark.parametrize("sharded", [False, True])
def test_tied_matrix_stored_as_head_is_read(tmp_path, kind, sharded):
    folder = models.save(tmp_path / "source", kind)
    expected = HFModel(folder).rows("embedding.weight", 0, 260)
    save_model(models.load(folder), str(folder / "model.safetensors"))
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" in tensors and not any(name.endswith(("wte.weight", "tokens.weight")) for name in tensors)
    if sharded:
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "a.safetensors")
        rewrite(folder / "model.safetensors.index.json", weight_map=dict.fromkeys(tensors, "a.safetensors"))
    found = HFModel(folder)
    assert found.tie == "tied" and torch.equal(found.rows("embedding.weight", 0, 260), expected)
    rewrite(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"has no tensor .*, only lm_head.weight, but config.json does not have"):
        HFModel(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_git_lfs_pointer_raises(llama3, tmp_path, name):
    folder = copied(llama3, tmp_path / "cloned")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        list(import_model([f"hf={folder}", f"run={tmp_path / 'run'}"]))


def test_file_instead_of_folder_raises(llama3):
    with pytest.raises(ValueError, match=r"model.safetensors is a file: give the folder of the model, .*source"):
        HFModel(llama3 / "model.safetensors")
