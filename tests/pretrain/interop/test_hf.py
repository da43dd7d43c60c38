"""Import and export of transformers models: equal results at any world size, equal bits back, equal text."""

import errno
import json
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data_prep.durable import exclusive
from data_prep.special_tokens import SpecialTokens
from pretrain.checkpoint import checkpoints
from pretrain.checkpoint.rows import CheckpointRows
from pretrain.commands import hf as hugging_face
from pretrain.commands.hf import export_model, import_model
from pretrain.config.generation import GenerateConfig
from pretrain.generation import generate
from pretrain.interop import export, folder
from pretrain.interop.folder import HFModel
from pretrain.interop.weights import load_model
from pretrain.locks import LAUNCH_LOCK, RANKS_LOCK, lock_run
from pretrain.models.llama import frequencies
from tests.data_prep.commands import ROOT, assert_one_error, python, small_spec
from tests.in_process import in_process
from tests.pretrain.interop import memory, models
from tests.pretrain.interop.models import KINDS, VOCAB
from tests.ranks import run_ranks

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-10}
CPU = torch.device("cpu")


def ids(seed: int, rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Returns a folder of each kind, made at first use."""
    base = tmp_path_factory.mktemp("hf")

    def folder_of(kind: str) -> Path:
        path = base / kind.replace(" ", "-").replace(",", "")
        return path if path.exists() else models.save(path, kind)

    return folder_of


def run_of(source: Path, run: Path, *settings: str) -> Path:
    list(import_model([f"hf={source}", f"run={run}", *settings]))
    return run


def outputs(rank: int, world: int, source: Path) -> list[tuple]:
    """Runs each rank's tokens in both precisions. Returns hidden states, rows and the sum of the losses."""
    answers = []
    for dtype in DTYPES:
        model = load_model(HFModel(source), CPU, dtype)
        tokens_BT = ids(rank)
        with torch.no_grad():
            hidden_BTD = model.body(model.vocab.lookup(tokens_BT))
            loss = model.vocab.loss(hidden_BTD[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()).loss
        answers.append((hidden_BTD, model.vocab.output_weight[: model.vocab.shard.valid_rows].detach(), loss))
    return answers


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_loss_match_transformers(hf, kind, world):
    answers = run_ranks(world, outputs, hf(kind)) if world > 1 else [outputs(0, 1, hf(kind))]
    for i, (dtype, tolerance) in enumerate(DTYPES.items()):
        rows = [answer[i][1] for answer in answers]
        assert max(map(len, rows)) <= -(-384 // world)
        for rank, answer in enumerate(answers):
            truth = models.logits(hf(kind), ids(rank), dtype)
            hidden_BTD, _, loss = answer[i]
            torch.testing.assert_close(hidden_BTD @ torch.cat(rows).T, truth, rtol=tolerance, atol=tolerance)
            dense = F.cross_entropy(truth[:, :-1].flatten(0, 1), ids(rank)[:, 1:].flatten(), reduction="sum")
            torch.testing.assert_close(loss, dense, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_mappings_match_shapes_of_body(hf, kind):
    found = HFModel(hf(kind))
    with torch.device("meta"):
        body = {name: tuple(parameter.shape) for name, parameter in found.model.body().named_parameters()}
    shapes = {name: mapping.shape for name, mapping in found.mappings.items()}
    matrices = ["embedding.weight", *(["head.weight"] if found.tie == "untied" else [])]
    assert shapes == body | dict.fromkeys(matrices, (VOCAB, found.model.width))


@pytest.mark.parametrize("kind", KINDS)
def test_export_and_import_are_bit_exact(hf, kind, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    run = run_of(hf(kind), tmp_path / "run")
    list(export_model([f"run={run}", f"out={out}"]))
    given, got = models.tensors_of(hf(kind)), models.tensors_of(out)
    assert given.keys() == got.keys() and all(torch.equal(given[name], got[name]) for name in given)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is ("tied" in kind.split())
    run_of(out, again)
    first, second = (CheckpointRows(checkpoints(path)[0]) for path in (run, again))
    assert first.shapes == second.shapes
    for name, (n, *_) in first.shapes.items():
        assert torch.equal(first.rows(name, 0, n), second.rows(name, 0, n)), name
    before, after = (HFModel(path).model for path in (hf(kind), out))
    assert before == after


def test_transformers_loads_export_without_warning(hf, tmp_path):
    """Loads without warnings and without missing, unexpected or random weights; tied models also with a stored head."""
    outs = []
    for i, kind in enumerate(KINDS):
        run = run_of(hf(kind), tmp_path / f"run-{i}")
        for head in ("true", "false"):
            outs.append(str(tmp_path / f"out-{i}-{head}"))
            list(export_model([f"run={run}", f"out={outs[-1]}", f"materialize_head={head}"]))
    code = f"""
import warnings
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, utils
utils.logging.disable_progress_bar()
warnings.simplefilter("error")
for out in {outs}:
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert not any(loading.values()), (out, loading)
    model.generate(**tokenizer("the loss", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert model.config.vocab_size == {VOCAB} == len(tokenizer)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    messages = [line for line in done.stderr.splitlines() if line.strip() and "torchvision" not in line]
    assert not messages, messages


@pytest.mark.parametrize("kind", ["gpt2 tied", "llama untied, biases", "qwen3 untied"])
def test_greedy_text_matches_transformers(hf, kind, tmp_path):
    run, out, prompt = run_of(hf(kind), tmp_path / "run"), tmp_path / "out", "the lost theory"
    list(export_model([f"run={run}", f"out={out}"]))
    ours = "".join(generate(GenerateConfig(run=str(run), prompt=prompt, tokens=24, temperature=0.0), CPU))
    tokenizer = models.transformers.AutoTokenizer.from_pretrained(out)
    begun = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt).input_ids]])
    drawn = models.load(out).generate(begun, max_new_tokens=24, do_sample=False)[0, begun.shape[1] :]
    theirs = tokenizer.decode(drawn, skip_special_tokens=True)
    assert len(drawn) == 24 and ours == f"{prompt}{theirs}\n"


def test_bare_body_and_materialised_head_are_supported(hf, tmp_path):
    for kind in ("gpt2 tied", "qwen2 tied"):
        bare = models.save(tmp_path / f"bare-{kind}", kind, bare=True)
        whole = models.tensors_of(hf(kind))
        assert all(torch.equal(tensor, whole[name]) for name, tensor in models.tensors_of(bare).items())
        run, out = run_of(bare, tmp_path / f"run-{kind}"), tmp_path / f"out-{kind}"
        list(export_model([f"run={run}", f"out={out}", "materialize_head=true"]))
        got = models.tensors_of(out)
        head = got.pop("lm_head.weight")
        assert torch.equal(head, got[HFModel(out).format.embedding])
        assert all(torch.equal(got[name], whole[name]) for name in whole) and HFModel(out).tie == "tied"
        torch.testing.assert_close(
            models.logits(out, ids(0), torch.float32), models.logits(hf(kind), ids(0), torch.float32)
        )


def test_sharded_bf16_files_survive_export_and_import(hf, tmp_path, monkeypatch):
    split = models.save(tmp_path / "split", "llama tied", max_shard_size="30KB")
    assert len(list(split.glob("*.safetensors"))) > 2
    run, out = run_of(split, tmp_path / "run"), tmp_path / "out"
    monkeypatch.setattr(export, "FILE_BYTES", 10_000)
    list(export_model([f"run={run}", f"out={out}", "dtype=bf16"]))
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    given, got = models.tensors_of(hf("llama tied")), models.tensors_of(out)
    assert all(torch.equal(got[name], given[name].bfloat16()) for name in given)
    assert models.transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize("last", ["one file", "several"])
def test_single_file_wins_over_index(tmp_path, last):
    """transformers writes one file and does not delete an old index."""
    for seed, size in enumerate(("30KB", "1GB") if last == "one file" else ("1GB", "30KB")):
        source = models.save(tmp_path / "both", "llama tied", seed=seed, max_shard_size=size)
    assert (source / "model.safetensors").is_file() and (source / "model.safetensors.index.json").is_file()
    theirs = models.transformers.AutoModelForCausalLM.from_pretrained(source).model.embed_tokens.weight
    assert torch.equal(HFModel(source).rows("embedding.weight", 0, VOCAB), theirs)


def test_matrix_is_read_in_pieces(hf, tmp_path, monkeypatch):
    """Import and export read at most one piece of the matrix at a time."""
    monkeypatch.setattr(folder, "PIECE_BYTES", 4800)  # 50 rows
    read: list[int] = []
    for owner in (HFModel, CheckpointRows):
        plain = owner.rows

        def rows(self, name, start, stop, plain=plain):
            if name in ("embedding.weight", "head.weight"):
                read.append(stop - start)
            return plain(self, name, start, stop)

        monkeypatch.setattr(owner, "rows", rows)
    run, out = run_of(hf("llama untied, biases"), tmp_path / "run"), tmp_path / "out"
    list(export_model([f"run={run}", f"out={out}"]))
    assert max(read) == 50 and sum(read) == 4 * VOCAB
    given, got = models.tensors_of(hf("llama untied, biases")), models.tensors_of(out)
    assert all(torch.equal(given[name], got[name]) for name in given)


def test_memory_does_not_grow_with_the_matrix():
    """Allows two pieces of 64 MiB and a constant, for a matrix of 256 MiB."""
    found = memory.measure()
    assert len(found) == 3 and all(0 < own < 160 for own, _ in found.values()), found


def test_missing_biases_are_written_as_zeros(tmp_path, hf):
    """Exports a model with qkv biases and query norms: Qwen3 then also has a bias of the attention output."""
    source = tmp_path / "source"
    run = run_of(hf("qwen3 untied"), tmp_path / "run")
    checkpoint = CheckpointRows(checkpoints(run)[0])
    model = HFModel(hf("qwen3 untied")).model
    model.bias = "qkv"
    shape = checkpoint.shapes["blocks.0.attention.qkv.weight"][:1]
    plain = checkpoint.rows

    def rows(name, start, stop):
        return torch.linspace(-1, 1, *shape)[start:stop] if name.endswith("bias") else plain(name, start, stop)

    checkpoint.rows = rows  # type: ignore[method-assign]
    checkpoint.shapes |= {f"blocks.{i}.attention.qkv.bias": shape for i in range(2)}
    export.export(checkpoint, model, small_spec(), source, torch.float32, False)
    got = models.tensors_of(source)
    assert (got["layers.1.self_attn.o_proj.bias"] == 0).all() and got["layers.1.self_attn.q_proj.bias"][0] == -1
    with warnings.catch_warnings(action="error"):
        assert models.load(source).config.attention_bias


def test_embed_scale_is_multiplied_into_embedding(hf, tmp_path):
    source, out = hf("gpt2 tied"), tmp_path / "out"
    checkpoint = CheckpointRows(checkpoints(run_of(source, tmp_path / "run"))[-1])
    export.export(checkpoint, HFModel(source).model, None, out, torch.float32, False, embed_scale=2.5)
    given, got = models.tensors_of(hf("gpt2 tied")), models.tensors_of(out)
    assert torch.equal(got["wte.weight"], 2.5 * given["wte.weight"]) and HFModel(out).tie == "untied"
    assert torch.equal(got["lm_head.weight"], given["wte.weight"])


def change(source: Path, to: Path, **settings: object) -> Path:
    """Copies a folder and changes settings in its config.json; None removes one."""
    to.mkdir()
    for path in source.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text()) | settings
    (to / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return to


def test_wide_window_and_missing_eos_are_accepted(hf, tmp_path):
    source = change(hf("mistral untied"), tmp_path / "changed", sliding_window=48, eos_token_id=[])
    assert (
        HFModel(source).model == HFModel(hf("mistral untied")).model and SpecialTokens({"eos_token_id": []}).ends == []
    )


def test_settings_of_transformers_4_are_read(hf, tmp_path):
    rope = {key: value for key, value in models.LLAMA3.items() if key != "rope_theta"}
    old = {"rope_parameters": None, "rope_theta": models.LLAMA3["rope_theta"], "rope_scaling": rope}
    assert HFModel(change(hf("llama tied"), tmp_path / "old", **old)).model == HFModel(hf("llama tied")).model


def test_rope_scaling_wins_over_rope_parameters(hf, tmp_path):
    scaling = models.LLAMA3 | {"factor": 2.0, "original_max_position_embeddings": 8}
    source = change(hf("llama tied"), tmp_path / "both", rope_scaling=scaling, original_max_position_embeddings=16)
    ours = HFModel(source).model
    assert (ours.rope_factor, ours.rope_original) == (2.0, 16)
    theirs = models.load(source)
    torch.testing.assert_close(theirs.model.rotary_emb.inv_freq, frequencies(ours, torch.device("cpu")))


def test_missing_tensor_and_wrong_dtype_raise(hf, tmp_path):
    source = change(hf("gpt2 tied"), tmp_path / "changed")
    file = source / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("ln_f.weight"))
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    with pytest.raises(ValueError, match=rf"{name} has dtype I8, must be one of F64"):
        HFModel(source)
    file.unlink()
    part = source / "model-00001-of-00001.safetensors"
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, part)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, part.name)}))
    with pytest.raises(ValueError, match=r"model-00001-of-00001.safetensors: .*ln_f"):
        HFModel(source)


WRONG = {
    "a family that we lack": ("gpt2 tied", {"model_type": "bloom"}, "model_type=bloom must be one of gpt2, llama"),
    "an activation": ("gpt2 tied", {"activation_function": "relu"}, "activation_function=relu must be gelu_new or"),
    "a width of the MLP": ("gpt2 tied", {"n_inner": 50}, "n_inner=50 must be None or 96"),
    "rotary scaling": ("llama tied", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type=yarn must be default or"),
    "a window": ("mistral untied", {"sliding_window": 8}, "sliding_window=8 must be null, or at least"),
    "mistral's window": ("mistral untied", {"max_position_embeddings": 5000, "sliding_window": None}, "=4096 must be"),
    "a number as text": ("gpt2 tied", {"n_layer": "1"}, "n_layer='1' must be a whole number"),
    "no eps": ("gpt2 tied", {"layer_norm_epsilon": []}, "layer_norm_epsilon=[] must be a number"),
    "another type": ("llama tied", {"rms_norm_eps": "small"}, "config.json: rms_norm_eps='small' must be a number"),
    "a list of families": ("gpt2 tied", {"model_type": ["gpt2"]}, "model_type=['gpt2'] must be one of"),
    "no width": ("llama tied", {"hidden_size": None}, "hidden_size is missing"),
    "a number of heads": ("llama tied", {"num_key_value_heads": 2.0}, "num_key_value_heads=2.0 must be a whole number"),
    "another vocabulary": ("gpt2 tied", {"vocab_size": 999}, "has 260 rows, but config.json says vocab_size=999"),
    "another shape": ("llama tied", {"intermediate_size": 41}, "has shape (40, 24), but config.json implies (41, 24)"),
    "a layer too many": ("gpt2 tied", {"n_layer": 1}, "which our body does not have"),
    "no head": ("gpt2 tied", {"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
    "two matrices, tied": ("gpt2 untied, exact gelu", {"tie_word_embeddings": True}, "that differs from its embedding"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unsupported_model_raises(hf, tmp_path, case):
    kind, settings, message = WRONG[case]
    source = change(hf(kind), tmp_path / "changed", **settings)
    with pytest.raises(ValueError) as error:
        HFModel(source)
    assert message in str(error.value) and str(source) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("lock", [LAUNCH_LOCK, RANKS_LOCK, "queued"])
def test_import_does_not_touch_running_run(hf, tmp_path, lock):
    """Refuses a run that a launcher or its ranks hold, or that waits in a queue, even without a checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    if lock == "queued":
        (run / "config.yaml").write_text("of that run")
    with nullcontext() if lock == "queued" else lock_run(run, lock):
        message = "must be new, but has config.yaml" if lock == "queued" else "is in use by another process"
        with pytest.raises(ValueError, match=message):
            run_of(hf("gpt2 tied"), run)
    assert not (run / "tokenizer").exists() and not checkpoints(run)
    if lock == "queued":
        assert (run / "config.yaml").read_text() == "of that run"
    else:
        assert not (run / "config.yaml").exists()


@pytest.mark.parametrize("step", ["write_streamed", "publish"])
def test_full_disk_leaves_no_run(hf, tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(f"pretrain.checkpoint.rows.{step}", full)
        run_of(hf("gpt2 tied"), run)
    assert not (run / "config.yaml").exists() and not list((run / "checkpoints").iterdir())
    run_of(hf("gpt2 tied"), run)


def test_commands_report_errors_in_one_line(hf, tmp_path):
    """Runs the first command in a separate process."""

    def command(*arguments: str):
        return in_process(hugging_face.main, *arguments)

    run, out, source = tmp_path / "run", tmp_path / "out", hf("gpt2 tied")
    done = python("-m", "pretrain.interop.hf", "import", f"hf={source}", f"run={run}", "seed=3", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{run}/checkpoints/step-00000000: 0.0M parameters, 260 rows, tied")
    assert "seed: 3" in (run / "config.yaml").read_text()
    done = command("export", f"run={run}", f"out={out}", "step=0")
    assert done.returncode == 0 and (out / "tokenizer.json").is_file(), done.stderr
    assert_one_error(command("import", f"hf={source}", f"run={run}"), "has step-00000000")
    assert_one_error(command("import", f"hf={tmp_path}", f"run={run}2"), "config.json is missing")
    assert_one_error(command("import", f"hf={source}", f"run={run}2", "model.width=9"), "model.width must not be given")
    assert_one_error(command("import", f"hf={source}", f"run={run}2", "sed=9"), "sed")
    assert_one_error(command("export", f"run={run}", f"out={out}"), f"out={out} exists")
    with exclusive(tmp_path / "other.unfinished.lock", "busy"):
        assert_one_error(command("export", f"run={run}", f"out={tmp_path}/other"), "is being written by another")
    assert not (tmp_path / "other").exists()
    assert_one_error(command("export", f"run={run}", f"out={out}2", "step=7"), "step=7 has no checkpoint")
    assert_one_error(command("export", f"run={run}", f"out={out}2", "dtype=int8"), "dtype=int8 must be one of")
    (source.parent / "pickled").mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (source.parent / "pickled" / name).write_bytes((source / "config.json").read_bytes())
    assert_one_error(command("import", f"hf={source.parent}/pickled", f"run={run}2"), "is a pickle, which is not read")
