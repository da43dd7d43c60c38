#!/usr/bin/env python
"""Plans memory, traffic and time of a training: `python launch/plan.py --help`. Starts nothing and needs no GPU."""

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this code comes before other code with the same names
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != str(ROOT / "launch"))]

from data_prep import terminal  # noqa: E402

if __name__ == "__main__":
    terminal.begin()  # before the imports that take seconds

from omegaconf import DictConfig, OmegaConf  # noqa: E402

from data_prep.command import one_line, run_hydra  # noqa: E402
from data_prep.progress import working  # noqa: E402
from launch import cluster as clusters  # noqa: E402
from launch.cluster import ClusterConfig  # noqa: E402
from pretrain.compose import build_config, register_groups  # noqa: E402
from pretrain.config.job import JobConfig  # noqa: E402
from pretrain.corpora import vocab_rows  # noqa: E402
from pretrain.data import open_data  # noqa: E402

EXIT_TOO_LARGE = 1


def main() -> None:
    """Prints the plan. Exits with 1 if the GPU cannot hold the training, 2 if a setting is wrong."""
    register_groups()
    clusters.register()
    run_hydra(_composed, "plan")


def _composed(composed: DictConfig) -> None:
    with one_line():
        OmegaConf.set_struct(composed, False)
        clusters.need_cluster(composed)
        given, plot = composed.pop("cluster"), composed.pop("plot")
        cluster = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), given))
        assert isinstance(cluster, ClusterConfig)
        config, rows = _training(composed)
        config.train.check_world(cluster.ranks)
        config.vocab.check_world(cluster.ranks)
        from launch.fit import larger, refusal  # these need torch; errors above are reported without waiting for it
        from launch.planner import plan
        from pretrain.announce import counts, parameters

        hardware, node, world = cluster.hardware, cluster.ranks_of_a_node, cluster.ranks
        planner = partial(plan, rows=rows, world=world, node=node, hardware=hardware)
        with working("plan"):
            planned = planner(config)
            refused = refusal(config, world, planner, cluster.gpu, hardware) if cluster.gpu else ""
        tokens, ranks = f"{planned.tokens:,} tokens per rank and step", planned.chosen.ranks
        if plot is None:
            terminal.product()
        print(f"{cluster.describe()}; {config.engine.title}; {rows:,} rows; {tokens}")
        print(f"model: {parameters(config, *counts(config, rows), rows)}")
        print(f"vocab.parallel={config.vocab.parallel}: {ranks} ranks per copy of the matrix\n")
        print(planned.table())
        if plot is not None:
            from launch.plan_picture import draw

            with working("draw"):
                draw(config, world, node, hardware, Path(plot))
            print(f"\npicture: {plot}")
        if refused:
            print(f"\ndoes not fit: {refused}")
            sys.exit(EXIT_TOO_LARGE)
        if cluster.gpu and (room := larger(config, world, planner, hardware.memory - hardware.reserved)):
            print(f"\nfits: {room}")


def _training(composed: DictConfig) -> tuple[JobConfig, int]:
    """Returns the configuration and the rows. A plan needs no run, and with vocab.size no data."""
    composed.run.dir = composed.run.dir or "not a run"
    known = composed.data.path or composed.data.corpora
    if not known and composed.vocab.size is None:
        raise ValueError("vocab.size=null must be given, or data.path, whose tokenizer has the size")
    composed.data.path = composed.data.path if known else "no data"
    config = build_config(composed)
    config.optim.check_steps(config.train.steps)
    if known:
        return config, vocab_rows(config, open_data(config.data))
    assert config.vocab.size is not None
    return config, config.vocab.size


if __name__ == "__main__":
    main()
