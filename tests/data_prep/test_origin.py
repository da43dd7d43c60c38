"""Names the file of conf/ that set a value of a refused setting."""

import pytest

from data_prep.origin import origins, remember

CHOSEN = {"recipe": "gpt2_124m", "model": "gpt2", "cluster": "a100x8", "hydra/output": "default", "optim": "adamw"}


@pytest.mark.parametrize(
    "message,said",
    [
        ("train.precision=bf16: no", "; recipe=gpt2_124m sets train.precision"),
        ("train.micro_batch=64 × 3 must divide train.global_batch=512; give", "micro_batch and train.global_batch"),
        ("cluster.gpu=a100-80gb, because cluster.gpus_per_node=8;", "; cluster=a100x8 sets cluster.gpu and cluster.g"),
        ("train.seq_len=2048 must not exceed model.context=1024", "; model=gpt2 sets model.context"),
        ("train.precision=fp32: no", None),
        ("train.steps=18865 is typed", None),
        ("give train.clip=1 or run.dir=a", None),
    ],
)
def test_source_of_a_value_is_named(message, said):
    remember(CHOSEN, ["+recipe=gpt2_124m", "train.steps=18865"])
    assert said in origins(message) if said else origins(message) == ""


def test_files_below_a_preset_count_and_a_resumed_run_has_its_own_values():
    remember({"model": "llama_8b"}, [])
    assert origins("vocab.tie=untied must") == "; model=llama_8b sets vocab.tie"
    remember({"model": "llama_8b"}, ["resume=runs/a"])
    assert origins("vocab.tie=untied must") == ""
