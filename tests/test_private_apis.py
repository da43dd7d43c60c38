"""Lists the private APIs of other packages that our code uses, so that a test fails if a new version drops one.

The test searches the source of all packages: it fails on a use that is not listed, and on a listed use that is gone.
"""

import ast
import importlib
import inspect
from functools import cache, reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {
    "_exit",
    "_fields",
    "_replace",
    "_asdict",
    "__deepcopy__",
    "__excepthook__",
    *dir(type),
    *dir(BaseException),
}  # Python's own, documented

PRIVATE = [  # the path in the other package; our use
    ("sys.__stderr__", "lm-eval's progress while standard error is closed"),
    ("lm_eval.api.task.Task._instances", "the requests of an earlier evaluation, removed"),
    ("s3fs.core.S3File._fetch_range", "a part of an object, if its version is that of the start"),
    ("atexit._run_exitfuncs", "a rank's end, which skips Python's own shutdown"),
    (
        "torch.distributed.distributed_c10d._set_pg_timeout",
        "a collective's timeout, set after the ranks have connected",
    ),
    ("torch.distributed.tensor.DTensor.__create_chunk_list__", "the offset of a shard in its whole tensor"),
    ("torch._assert_async", "a check of the loss that does not wait for the GPU"),
    ("torch._foreach_norm", "the norm of the gradients, in one kernel"),
    ("torch._foreach_mul_", "the clip, in one kernel"),
    ("torch._foreach_lerp_", "the running average, in one kernel"),
    ("torch.cuda.memory._record_memory_history", "the memory snapshot of a trace"),
    ("torch.cuda.memory._dump_snapshot", "the memory snapshot of a trace"),
    ("torch.utils.cpp_extension._get_build_directory", "finds the lock of a killed build of DeepSpeed"),
    ("torch._subclasses.fake_tensor.FakeTensorMode", "the rehearsal before a submit"),
    ("torch._subclasses.fake_tensor.FakeTensor", "the rehearsal before a submit"),
    ("torch.testing._internal.distributed.fake_pg.FakeStore", "the rehearsal's ranks"),
    ("torch.utils._python_dispatch.TorchDispatchMode", "the rehearsal before a submit"),
    ("torch.ops.aten._local_scalar_dense", "the rehearsal's answer to item()"),
    ("torch.ops.aten._scaled_dot_product_flash_attention", "kept by selective activation checkpointing"),
    ("torch.ops.aten._scaled_dot_product_efficient_attention", "kept by selective activation checkpointing"),
    ("torch.ops.aten._scaled_dot_product_cudnn_attention", "kept by selective activation checkpointing"),
    ("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "kept by selective activation checkpointing"),
    (
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
        "moments before the first step",
    ),
    (
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer._wait_for_offload_copies",
        "gradients in the host's memory",
    ),
    ("deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._get_norm_groups", "DeepSpeed's norm, replaced"),
    ("hydra._internal.utils.get_args_parser", "the flags that Hydra takes"),
    ("hydra._internal.hydra.Hydra", "its second composition, left out if nothing can have set hydra.mode"),
    ("omegaconf.DictConfig._get_node", "a setting's node, to name its allowed values"),
    ("omegaconf.DictConfig._is_none", "a setting's node"),
    ("omegaconf.DictConfig._is_missing", "a setting's node"),
    ("omegaconf.base.Node._metadata", "a setting's type"),
    ("tiktoken.Encoding._mergeable_ranks", "an encoding's ranks, written beside the data"),
    ("tiktoken.Encoding._pat_str", "an encoding's split pattern"),
    ("tiktoken.Encoding._special_tokens", "an encoding's special tokens"),
]
INTERNAL = [  # undocumented, without an underscore: a class, mostly of DeepSpeed's optimizers, and what we use of it
    ("hydra._internal.hydra.Hydra", ["get_mode"]),
    (
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
        [
            "scaled_global_norm",
            "averaged_gradients",
            "cpu_offload",
            "single_partition_of_fp32_groups",
            "round_robin_bit16_groups",
            "round_robin_bit16_offsets",
        ],
    ),
    (
        "deepspeed.runtime.bf16_optimizer.BF16_Optimizer",
        [
            "get_grads_for_norm",
            "fp32_groups_gradient_flat_partition",
            "bf16_groups",
            "fp32_groups_flat_partition",
        ],
    ),
    (
        "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3",
        ["fp32_partitioned_groups_flat", "offload_optimizer", "fp16_groups"],
    ),
    ("deepspeed.runtime.zero.partition_parameters", ["ds_tensor"]),
    ("deepspeed.ops", ["__compatible_ops__"]),
]


def found(path: str) -> object:
    """The object at a dotted path: imports the longest module, then follows the attributes."""
    names = path.split(".")
    for count in range(len(names), 0, -1):
        try:
            module = importlib.import_module(".".join(names[:count]))
        except ModuleNotFoundError:
            continue
        return reduce(_attribute, names[count:], module)
    raise AttributeError(f"{names[0]} is not installed")


def _attribute(owner: object, name: str) -> object:
    """The attribute of a module or class; None if only instances have it."""
    if not hasattr(owner, name) and isinstance(owner, type) and name in inspect.getsource(owner):
        return None
    return getattr(owner, name)


@pytest.mark.parametrize(("path", "purpose"), PRIVATE)
def test_private_name_exists(path: str, purpose: str) -> None:
    try:
        found(path)
    except AttributeError as error:
        pytest.fail(f"{path} is gone ({error}). It is used for: {purpose}, in {', '.join(files_with(path))}")


@pytest.mark.parametrize(("owner", "names"), INTERNAL)
def test_internal_name_exists(owner: str, names: list[str]) -> None:
    source = inspect.getsource(found(owner))  # type: ignore[arg-type]
    for name in names:
        used_in = files_with(name)
        assert used_in, f"{name} is no longer used: remove it from this list"
        assert name in source, f"{owner} no longer has {name}, used in {', '.join(used_in)}"


def test_every_private_name_is_listed() -> None:
    listed = {last_private(path) for path, _ in PRIVATE}
    used = {name for names in private_names().values() for name in names}
    assert sorted(used - listed) == [], "a private name of another package, not listed above"
    assert sorted(listed - used) == [], "listed above, but no longer used: remove it"


def last_private(path: str) -> str:
    """The name by which our source uses it: the private attribute, or the private module that it is imported from."""
    *modules, name = path.split(".")
    return name if name.startswith("_") else ".".join(modules)


def files_with(path: str) -> list[str]:
    return [str(file) for file, text in sources().items() if last_private(path) in text]


@cache
def sources() -> dict[Path, str]:
    folders = (ROOT / name for name in ("pretrain", "launch", "data_prep"))
    return {file.relative_to(ROOT): file.read_text() for folder in folders for file in sorted(folder.rglob("*.py"))}


def private_names() -> dict[Path, set[str]]:
    """Maps files to the attributes and imports with a leading underscore that our own code does not define."""
    trees = {file: list(ast.walk(ast.parse(text))) for file, text in sources().items()}
    own = {name for nodes in trees.values() for node in nodes for name in _defined(node)} | PUBLIC
    return {file: {name for node in nodes for name in _private(node)} - own for file, nodes in trees.items()}


def _defined(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return [node.attr] if isinstance(node.ctx, ast.Store) else []
    return []


def _private(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        names = [node.attr]
    elif isinstance(node, ast.ImportFrom):
        names = [alias.name for alias in node.names]
        if node.module and not node.module.startswith(("pretrain", "launch", "data_prep")):
            names = [name for name in names if name.startswith("_")] or [node.module]
    else:
        return []
    return [name for name in names if any(part.startswith("_") for part in name.split("."))]
