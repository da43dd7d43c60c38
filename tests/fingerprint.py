"""Shows that a refactoring changed no bit: the numbers and files of small runs, before and after it.

    python tests/fingerprint.py BEFORE.json --tree PATH_OF_THE_TREE_BEFORE
    python tests/fingerprint.py AFTER.json
    python tests/fingerprint.py --compare BEFORE.json AFTER.json

Runs the commands that users type in a temporary folder, with the code of `--tree` (by default its own tree), and reads
the files that they write. It imports nothing from the tree, so the same script runs on both. It does about 30 runs of
six steps on one to four gloo ranks, which takes some minutes on two cores. `--only WORD` selects the cases with WORD in
their name, also in a comparison. The comparison prints the differences and exits 1, or counts what is identical and
exits 0.

A case records
- every scalar and list of `metrics.jsonl` (loss, grad_norm, lr, val_loss, the monitors' values, ...), in hex;
- how each start ended: class, step and decision of `restarts.jsonl`;
- the sha256 of every file of tensors, and of each checkpoint's manifest without what MANIFEST_LEFT_OUT names;
- for a corpus, the sha256 of its token files and of its tokenizer.

Left out, because two runs of the same code differ in them: times, rates and memory in the metrics; times, job and host
in `restarts.jsonl`; TensorBoard's files; and in the manifest its date, `rng` (torch seeds each process randomly, and a
run does not use that), `config` (paths of the temporary folder, and new keys), and the manifest's own hash, which
covers them.

The bits depend on the machine and its packages: make both files on one machine. `engine.offload=cpu` runs only with
DeepSpeed (FSDP2 refuses it on a CPU), bf16 only if the processor computes it natively.
"""

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300  # seconds; a command should take about ten
SHOWN = 5  # differences shown per case
METRICS_LEFT_OUT = {
    "tokens_per_s",
    "tokens_per_s_per_rank",
    "step_s",
    "peak_memory_gib",
    "data_wait",
    "communication_s",
    *(f"step_s/{part}" for part in ("data", "forward", "head", "backward", "optimizer", "hooks")),
    "lens_seconds",
}
MANIFEST_LEFT_OUT = {"date", "rng", "config", "sha256"}

LOOP = (
    "seed=7 train.steps=6 train.global_batch=12 train.micro_batch=3 train.precision=fp32 optim.lr=1e-2"
    " optim.warmup_steps=2 log.every=1 log.tensorboard=false eval.every=3 eval.max_windows=24 checkpoint.every=3"
    " checkpoint.keep=0 restart.without_progress=0 vocab.multiple=8"
)
SMALL = "model.layers=2 model.width=24 model.context=16"
GPT2 = f"{SMALL} model.heads=3"
LLAMA = f"model=llama_tiny {SMALL} model.heads=2 model.kv_heads=1 model.inner=40"
ALL_OF_LLAMA = f"{LLAMA} model.qk_norm=true model.rope_factor=8 model.rope_original=16 model.bias=qkv"
ZERO = "engine=deepspeed engine.zero_stage="
SPLIT_ALL = "engine.extra.zero_optimization.stage3_param_persistence_threshold=0"
LOSS = "vocab.label_smoothing=0.1 vocab.z_loss=1e-3 vocab.softcap=10 vocab.embed_scale=4.9"
ONE, TWO = "data.path={web}", "data.corpora.web={web} data.corpora.code={code} data.weights={{web:2,code:1}}"
TOKENS = {
    "web": "corpus.paths=[{folder}/web.jsonl] tokenizer=bpe tokenizer.vocab_size=390",
    "code": "corpus.paths=[{folder}/code.jsonl] tokenizer=file tokenizer.path={web}/tokenizer clean.deduplicate=true",
    "units": "corpus.paths=[{folder}/web.jsonl,{folder}/code.jsonl] tokenizer=bpe tokenizer.vocab_size=300"
    " tokenizer.pattern=gpt2 clean.deduplicate=true clean.min_bytes=60 unit_mib=0.02",
}
RUNS: dict[str, tuple[str, ...]] = {  # the runs of a case, one after the other in the same folder
    "fsdp2, 1 rank": (f"nproc=1 {GPT2} {ONE}",),
    "fsdp2, 2 ranks": (f"nproc=2 {GPT2} {ONE}",),
    "fsdp2, 4 ranks": (f"nproc=4 vocab.parallel=4 {GPT2} {ONE}",),
    "fsdp2, 4 ranks, 2 share the matrix": (f"nproc=4 vocab.parallel=2 {GPT2} {ONE}",),
    "fsdp2, 2 ranks, none share the matrix": (f"nproc=2 vocab.parallel=1 {GPT2} {ONE}",),
    "fsdp2, hsdp": (f"nproc=4 vocab.parallel=2 engine.hsdp=true {GPT2} {ONE}",),
    "fsdp2, block checkpointing": (f"nproc=2 engine.activation_checkpointing=block {GPT2} {ONE}",),
    "fsdp2, selective, unsharded": (
        f"nproc=2 engine.activation_checkpointing=selective engine.reshard_after_forward=false {GPT2} {ONE}",
    ),
    "fsdp2, bf16": (f"nproc=2 {GPT2} {ONE} train.precision=bf16",),
    "deepspeed, zero 0": (f"nproc=2 {ZERO}0 {GPT2} {ONE}",),
    "deepspeed, zero 1": (f"nproc=2 {ZERO}1 {GPT2} {ONE}",),
    "deepspeed, zero 2": (f"nproc=2 {ZERO}2 {GPT2} {ONE}",),
    "deepspeed, zero 2, offload": (f"nproc=2 {ZERO}2 engine.offload=cpu {GPT2} {ONE}",),
    "deepspeed, zero 3": (f"nproc=2 {ZERO}3 {SPLIT_ALL} {GPT2} {ONE}",),
    "deepspeed, zero 3, llama, block checkpointing": (
        f"nproc=2 {ZERO}3 engine.activation_checkpointing=block {ALL_OF_LLAMA} {ONE}",
    ),
    "deepspeed, bf16": (f"nproc=2 {ZERO}1 {GPT2} {ONE} train.precision=bf16",),
    "llama": (f"nproc=2 {LLAMA} {ONE}",),
    "llama, qk_norm, rope, bias": (f"nproc=2 {ALL_OF_LLAMA} {ONE}",),
    "untied": (f"nproc=2 vocab.tie=untied {GPT2} {ONE}",),
    "untied on the way": (f"nproc=2 vocab.untie_at=3 {GPT2} {ONE}",),
    "schedule wsd": (f"nproc=2 optim.schedule=wsd optim.decay_fraction=0.5 {GPT2} {ONE}",),
    "terms of the loss": (f"nproc=2 {LOSS} {GPT2} {ONE}",),
    "terms of the loss, untied": (f"nproc=4 vocab.parallel=2 vocab.tie=untied {LOSS} {LLAMA} {ONE}",),
    "loss in chunks": (
        f"nproc=1 vocab.head_memory_mib=1 train.micro_batch=12 {GPT2} {ONE} model.context=64 eval.max_windows=12",
    ),
    "input_grad_scale": (f"nproc=2 vocab.input_grad_scale=0.5 {GPT2} {ONE}",),
    "masked documents": (f"nproc=2 data.documents=masked {GPT2} {ONE}",),
    "best fit": (f"nproc=2 data.documents=masked data.packing=best_fit {LLAMA} {ONE}",),
    "two corpora, stages": (f"nproc=2 {GPT2} {TWO} data.stages={{{{36:{{{{web:1,code:3}}}}}}}}",),
    "monitors": (f"nproc=2 monitor.embedding=2 monitor.lens=3 {GPT2} {TWO}",),
    "monitors, untied on the way": (
        f"nproc=4 vocab.parallel=2 vocab.untie_at=3 monitor.embedding=2 monitor.lens=3 {LLAMA} {ONE}",
    ),
    "fsdp2 to deepspeed": (
        f"nproc=2 {GPT2} {TWO} train.stop_after=3",
        f"nproc=4 vocab.parallel=2 {ZERO}3 {SPLIT_ALL} {GPT2} {TWO}",
    ),
    "deepspeed to fsdp2": (
        f"nproc=2 {ZERO}1 monitor.embedding=2 {GPT2} {ONE} train.stop_after=3",
        f"nproc=1 monitor.embedding=2 {GPT2} {ONE} train.micro_batch=4",
    ),
}


@dataclass
class Case:
    """The results of a case: its numbers as text, and the sha256 of its files, by where each was found."""

    numbers: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.json")
    parser.add_argument("--tree", type=Path, default=ROOT, metavar="PATH")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"))
    options = parser.parse_args()
    if (options.out is None) == (options.compare is None):
        parser.error("give either OUT.json or --compare A.json B.json")
    if options.compare:
        return compare(*(cases_in(path, options.only) for path in options.compare))
    cases: dict[str, Case] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in measure(Tree(options.tree.resolve()), Path(folder), options.only):
            cases[name] = case  # written after each case, so that an interrupted run can be compared
            options.out.write_text(json.dumps({key: vars(done) for key, done in cases.items()}, indent=1) + "\n")
    print(f"{options.out}: {counts(cases)}")
    return 0


class Tree:
    """The code under test: runs its commands with this interpreter, one thread per process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(path)}
        imported = Path(self.run("-c", "import pretrain; print(pretrain.__file__)").strip())
        assert imported.is_relative_to(path), f"{imported} is not in {path}"

    def run(self, *arguments: str) -> str:
        """Runs a command and returns its output. Raises SystemExit with the output if it fails."""
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=self.path, env=self.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}exit code {done.returncode}")
        return done.stdout


def measure(tree: Tree, folder: Path, only: str) -> Iterator[tuple[str, Case]]:
    """Runs every selected case and prints one line each. Always tokenises, because the runs need the token files."""
    write_texts(folder)
    names = {"folder": str(folder), **{corpus: str(folder / "tokens" / corpus) for corpus in TOKENS}}
    for corpus, settings in TOKENS.items():
        start = time.monotonic()
        out = Path(names[corpus])
        arguments = f"corpus=files val_fraction=0.1 workers=2 out={out} {settings.format(**names)}"
        tree.run("data_prep/tokenize.py", *arguments.split())
        yield from chosen(only, f"tokens, {corpus}", read_tokens(out), start)
    for number, (name, launches) in enumerate(RUNS.items()):
        if only not in name:
            continue
        if "bf16" in name and not computes_bf16():
            print(f"{name}: skipped, this processor does not compute bf16 natively", flush=True)
            continue
        start = time.monotonic()
        run = folder / f"run-{number}"
        for settings in launches:
            tree.run("launch/local.py", f"run.dir={run}", *f"{LOOP} {settings.format(**names)}".split())
        yield from chosen(only, name, read_run(run), start)


def chosen(only: str, name: str, case: Case, start: float) -> Iterator[tuple[str, Case]]:
    if only in name:
        seconds = time.monotonic() - start
        print(f"{name}: {len(case.numbers)} numbers, {len(case.files)} files, {seconds:.1f} s", flush=True)
        yield name, case


def write_texts(folder: Path) -> None:
    """Writes two corpora of generated documents, from a few characters to a few windows long, some of them twice."""
    draw = random.Random(0)
    for corpus, form in (("web", "{} times {} is {}. "), ("code", "x[{}] = f({}, {})\n")):
        texts = []
        for i in range(150):
            parts = (form.format(i, j, i * j) for j in range(draw.choice([1, 2, 4, 30])))
            texts += [f"{corpus} {i}: " + "".join(parts)] * draw.choice([1, 1, 1, 2])
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{corpus}.jsonl").write_text("".join(lines))


def read_tokens(out: Path) -> Case:
    files = [path for path in sorted(out.rglob("*")) if path.suffix in (".bin", ".idx", ".tiktoken")]
    return Case(files={str(path.relative_to(out)): sha256(path.read_bytes()) for path in files})


def read_run(run: Path) -> Case:
    case = Case()
    for line in lines_of(run / "metrics.jsonl"):
        rows = {f"rows/{name}": ids for name, ids in line.pop("rows", {}).items()}
        for key, value in (line | rows).items():
            if key not in METRICS_LEFT_OUT:
                case.numbers[f"step {line['step']} {key}"] = exact(value)
    for number, end in enumerate(lines_of(run / "restarts.jsonl"), start=1):
        case.numbers[f"start {number}"] = f"{end['class']}, step {end['step']}: {end['decision']}"
    for checkpoint in sorted((run / "checkpoints").iterdir()):
        for path in sorted(checkpoint.iterdir()):
            content = manifest_of(path) if path.name == "manifest.json" else path.read_bytes()
            case.files[f"{checkpoint.name}/{path.name}"] = sha256(content)
    assert case.numbers and case.files, f"{run} is empty"
    return case


def manifest_of(path: Path) -> bytes:
    """The manifest in a fixed order, without the values that differ between two runs of the same code."""
    manifest = {key: value for key, value in json.loads(path.read_text()).items() if key not in MANIFEST_LEFT_OUT}
    return json.dumps(manifest, sort_keys=True).encode()


def exact(value: Any) -> str:
    """All bits of a number; a list of ids as it is."""
    return float(value).hex() if isinstance(value, int | float) else json.dumps(value)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def computes_bf16() -> bool:
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text()) is not None


def cases_in(path: Path, only: str) -> dict[str, Case]:
    return {name: Case(**case) for name, case in json.loads(path.read_text()).items() if only in name}


def counts(cases: dict[str, Case]) -> str:
    numbers, files = (sum(len(vars(case)[kind]) for case in cases.values()) for kind in ("numbers", "files"))
    return f"{len(cases)} cases, {numbers} numbers, {files} files"


def compare(ours: dict[str, Case], theirs: dict[str, Case]) -> int:
    """Prints the differences by case. Returns the exit code: 1 if there are any, or if there is nothing to compare."""
    different = 0
    for name in ours | theirs:
        if name not in ours or name not in theirs:
            print(f"{name}: only in the {'first' if name in ours else 'second'} file")
            different += 1
        elif found := differences(ours[name], theirs[name]):
            more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
            print("\n  ".join([f"{name}: {len(found)} differ", *found[:SHOWN], *more]))
            different += 1
    if not ours and not theirs:
        print("no case to compare")
    elif different:
        print(f"{different} of {len(ours | theirs)} cases differ")
    else:
        print(f"{counts(ours)}: identical")
        return 0
    return 1


def differences(ours: Case, theirs: Case) -> list[str]:
    """One line per number or file that differs, in the order of the steps."""
    a, b = ({**case.numbers, **case.files} for case in (ours, theirs))
    return [f"{key}: {shown(a.get(key))} is not {shown(b.get(key))}" for key in a | b if a.get(key) != b.get(key)]


def shown(value: str | None) -> str:
    """A number in hex and decimal; a hash shortened."""
    if value is None:
        return "nothing"
    try:
        return f"{value} ({float.fromhex(value)!r})" if "0x" in value else value[:60]
    except ValueError:
        return value[:60]


if __name__ == "__main__":
    sys.exit(main())
