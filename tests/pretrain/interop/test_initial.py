"""init_from=hf:DIR: training continues as in transformers."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from data_prep.bpe import PATTERNS
from data_prep.tokenizer_spec import END_OF_DOCUMENT, TokenizerSpec
from pretrain.checkpoint import checkpoints
from pretrain.checkpoint.rows import CheckpointRows
from pretrain.checks import check_job
from pretrain.commands.hf import export_model, import_model
from pretrain.compose import build_config
from pretrain.config.data import DataConfig
from pretrain.data import IGNORED, open_data
from pretrain.interop.folder import HFModel
from pretrain.interop.initial import check_initial
from pretrain.optim import body_optimizer, lr_at
from pretrain.vocab import VocabConfig
from tests.data_prep.commands import small_spec
from tests.pretrain.dense import windows_of
from tests.pretrain.engine.test_engines import ENGINES, outcome, train_ranks
from tests.pretrain.helpers import make_corpus
from tests.pretrain.interop import models
from tests.pretrain.interop.models import VOCAB
from tests.pretrain.tiny import tiny_config, write_tokens
from tests.ranks import run_ranks

STEPS = 6
KINDS = ["gpt2 tied", "qwen3 untied"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("initial")
    write_tokens(folder / "tokens", VOCAB)
    for kind in (*KINDS, "llama untied, biases"):
        models.save(folder / kind, kind)
    return folder


def config_of(folder: Path, kind: str, name: str, **changes):
    source = HFModel(folder / kind)
    settings = {
        "model": asdict(source.model),
        "vocab__size": VOCAB,
        "vocab__tie": source.tie,
        "vocab__parallel": 2,
        "train__steps": STEPS,
        "train__global_batch": 24,
        "train__micro_batch": 6,
        "train__seq_len": 16,
        "optim__lr": 1e-3,
        "optim__eps": 1e-5,
    }
    config = tiny_config(folder / "tokens", folder / name, **settings | changes)
    config.init_from = f"hf:{folder / kind}"
    return config


def losses_of_transformers(folder: Path, kind: str) -> list[float]:
    """Losses of a plain training loop around the transformers model."""
    config, model = config_of(folder, kind, "unused"), models.load(folder / kind)
    optim, losses = config.optim, []
    optimizer = body_optimizer(optim).build(model.parameters(), optim, optim.body)
    for step in range(STEPS):
        tokens, targets = windows_of(config, step)
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        losses.append(float(loss.detach()))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step(lr_at(optim, step, STEPS))
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_training_matches_transformers_under_each_engine(folder, kind):
    names = ENGINES if kind == "gpt2 tied" else ("hsdp", "zero0", "zero2")  # the rest on three ranks, below
    configs = [config_of(folder, kind, f"{kind}-{name}", engine=ENGINES[name]) for name in names]
    run_ranks(2, train_ranks, configs, timeout=180)
    truth = losses_of_transformers(folder, kind)
    for config in configs:
        np.testing.assert_allclose(outcome(config.run_dir).losses, truth, rtol=1e-5)


def test_three_unequal_shards_match_source(folder):
    engines = {name: ENGINES[name] for name in ("fsdp2", "zero1", "zero3")}
    sizes = {"vocab__parallel": 3, "train__micro_batch": 4}
    kind = "qwen3 untied"
    configs = [config_of(folder, kind, f"three-{name}", engine=engine, **sizes) for name, engine in engines.items()]
    run_ranks(3, train_ranks, configs, timeout=180)
    truth = losses_of_transformers(folder, kind)
    for config in configs:
        run = outcome(config.run_dir)
        np.testing.assert_allclose(run.losses, truth, rtol=1e-5)
        checkpoint = CheckpointRows(checkpoints(config.run_dir)[-1])  # of three files
        for name, tensor in run.tensors.items():
            assert torch.equal(checkpoint.rows(name, 0, len(tensor)), tensor), name
            assert torch.equal(checkpoint.rows(name, 1, len(tensor) - 1), tensor[1:-1]), name
        list(export_model([f"run={config.run_dir}", f"out={config.run_dir}-out"]))
        assert models.load(Path(f"{config.run_dir}-out")).config.vocab_size == VOCAB


def test_resume_import_and_untying_keep_losses(folder):
    """Resumes without the source, which a checkpoint makes unnecessary."""
    kind = "gpt2 tied"
    source = folder / "gone"
    shutil.copytree(folder / kind, source)
    (source / "tokenizer.json").unlink()  # the data has none, too
    imported = folder / "imported"
    straight = config_of(folder, kind, "straight")
    list(import_model([f"hf={source}", f"run={imported}", "seed=7", "vocab.multiple=8", "train.seq_len=16"]))
    from_import = config_of(folder, kind, "imported")
    from_import.init_from = None
    halves = [config_of(folder, kind, "halves", train__stop_after=stop) for stop in (3, STEPS)]
    halves[0].init_from = f"hf:{source}"
    untied = config_of(folder, kind, "untied", vocab__tie="untied")
    run_ranks(2, train_ranks, [straight, from_import, halves[0], untied], timeout=180)
    shutil.rmtree(source)
    halves[1].init_from = f"hf:{source}"
    check_job(halves[1], 2, "cpu")
    for run in (halves[1], from_import):
        with pytest.raises(ValueError, match=r"holds a run with init_from=.*, this command has hf:.*other: choose"):
            check_job(replace(run, init_from=f"hf:{folder / 'other'}"), 2, "cpu")
    run_ranks(2, train_ranks, halves[1:], timeout=120)
    truth = outcome(straight.run_dir)
    for other in (from_import, halves[1]):
        got = outcome(other.run_dir)
        assert got.losses == truth.losses
        assert all(torch.equal(got.tensors[name], truth.tensors[name]) for name in truth.tensors)
    apart = outcome(untied.run_dir)
    assert apart.losses[0] == truth.losses[0] and apart.losses[-1] != truth.losses[-1]


def test_all_different_settings_are_named(folder):
    model, vocab = HFModel(folder / "qwen3 untied").model, VocabConfig(tie="untied")
    source = f"hf:{folder / 'qwen3 untied'}"
    check_initial(source, model, vocab, VOCAB, None)
    model.context = 7  # does not affect weights
    assert model.head_size == 10
    check_initial(source, model, vocab, VOCAB, None)
    llama = HFModel(folder / "llama untied, biases").model
    llama.head_size = llama.size  # explicit in its config.json; null means the same
    check_initial(f"hf:{folder / 'llama untied, biases'}", llama, vocab, VOCAB, None)
    model.layers, model.qk_norm, model.head_size = 3, False, None
    with pytest.raises(ValueError) as error:
        check_initial(source, model, VocabConfig(embed_scale=2.0, softcap=30.0), 300, None)
    expected = "model.layers=2 model.head_size=10 model.qk_norm=true vocab.size=260 vocab.tie=untied"
    expected += " vocab.embed_scale=1.0 vocab.softcap=null"
    assert str(error.value) == f"init_from={source} has other settings than this run: give {expected}"
    with pytest.raises(ValueError, match=r"model.family=gpt2 must be llama"):
        check_initial(source, HFModel(folder / "gpt2 tied").model, vocab, VOCAB, None)


def test_other_tokenizer_raises(folder, tmp_path):
    source = HFModel(folder / "gpt2 tied")
    small_spec().save(tmp_path / "same")
    small_spec(("he", "hen", " hen")).save(tmp_path / "other")
    ends = {END_OF_DOCUMENT: VOCAB - 1, "<|x|>": VOCAB}
    replace(small_spec(), special_tokens=ends | {"<|begin|>": VOCAB + 1}).save(tmp_path / "more")
    replace(small_spec(), special_tokens={END_OF_DOCUMENT: VOCAB}).save(tmp_path / "other end")
    ask = f"hf:{source.folder}", source.model, VocabConfig(), VOCAB
    check_initial(*ask, tmp_path / "same")
    check_initial(*ask, tmp_path / "more")
    for other in ("other", "other end"):
        with pytest.raises(ValueError, match=rf"has another tokenizer than .*{other}: its rows mean other tokens"):
            check_initial(*ask, tmp_path / other)


def test_imported_run_requires_data_with_same_tokens(folder, tmp_path):
    """Accepts another pattern, seed, length and packing before the first sample, but not other rows."""
    run, corpus = tmp_path / "run", make_corpus(tmp_path / "data")
    spec = TokenizerSpec.load(open_data(DataConfig(path=str(corpus))).tokenizer)
    source = models.save(tmp_path / "source", "gpt2 tied", spec=replace(spec, pattern=PATTERNS["cl100k"]))
    list(import_model([f"hf={source}", f"run={run}"]))
    config = tiny_config(corpus, run, model=asdict(HFModel(source).model), vocab__size=None, vocab__multiple=128)
    config.seed, config.train.seq_len, config.data.packing = 5, 20, "best_fit"
    check_job(config, 1, "cpu")
    small_spec(("he", "hen", " hen")).save(run / "tokenizer")
    with pytest.raises(ValueError, match=r"holds a run with tokenizer .*choose another run\.dir"):
        check_job(config, 1, "cpu")


@pytest.mark.parametrize("given", ["gpt2", "hf:", "hub:gpt2"])
def test_invalid_init_from_raises(folder, given):
    with pytest.raises(ValueError, match=f"init_from={given} must be hf:DIR"):
        tiny = asdict(config_of(folder, "gpt2 tied", "unused"))
        build_config(OmegaConf.create(tiny | {"init_from": given}))


def test_paths_become_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = config_of(folder, "gpt2 tied", "unused")
    config.init_from = "hf:gpt2 tied"
    config.resolve()
    assert config.init_from == f"hf:{folder / 'gpt2 tied'}" and folder / "gpt2 tied" in config.reads
