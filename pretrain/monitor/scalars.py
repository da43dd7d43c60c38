"""All scalars that a run logs: key in metrics.jsonl, tag in TensorBoard, unit, meaning, and what is healthy.

The keys are a file format. The tags may change: TensorBoard sorts groups and cards by their tags, shows the first two
groups open, and everything else closed. So groups begin with a number, and what belongs to one bin, layer or corpus
goes to the last group, `details`, where the Custom Scalars tab draws it as one chart per quantity.
"""

from dataclasses import dataclass

TRAINING, DATA, MATRIX, LENS = "1 training", "2 data", "3 matrix", "4 lens"
DETAILS = "details"
ABOUT = "about"  # group of the texts about the run: before `rows`
CORPUS, BIN, LAYER, PART, TASK = "/CORPUS", "/BIN", "/LAYER", "/PART", "/TASK"


@dataclass(frozen=True)
class Scalar:
    """One scalar, or several whose keys have the same first part."""

    key: str  # in metrics.jsonl, without its form
    title: str
    unit: str  # "": a plain number
    meaning: str
    healthy: str
    card: str = ""  # tag in TensorBoard of the key alone; "": it is a detail
    forms: tuple[str, ...] = ("",)  # what may follow the key: CORPUS, BIN, LAYER, PART and TASK stand for names

    @property
    def tag(self) -> str:
        return self.card or f"{DETAILS}/{self.key}"


def _of_matrix(key: str, name: str) -> tuple[Scalar, ...]:
    """The measures of the embedding, or of the head that a model with two matrices has."""
    card = f"{MATRIX}/{key}"
    return (
        Scalar(
            f"{key}_norm",
            f"{name}: norm of a row",
            "",
            "Mean norm of the rows. /BIN: of the rows of one frequency bin.",
            "Grows, then levels off. Rare rows stay behind frequent ones. If it never levels off, raise weight decay.",
            f"{card}_norm",
            ("", BIN),
        ),
        Scalar(
            f"{key}_effective_rank",
            f"{name}: effective rank",
            "directions",
            "e to the entropy of the spectrum of the rows' covariance. At most the width.",
            "Falls early, then is steady. A steady fall means that the rows collapse into few directions.",
            f"{card}_effective_rank",
        ),
        Scalar(
            f"{key}_damaged",
            f"{name}: damaged rows",
            "rows",
            "Rows with a number that is not finite, or with only zeros. No other measure includes them.",
            "0.",
            f"{card}_damaged" if key == "embedding" else "",
        ),
        Scalar(
            f"{key}_like_unseen",
            f"{name}: rows that look unseen",
            "rows",
            "Rows that were used, and are no farther from the centroid of the unused rows than the farthest of these:"
            " candidates for glitch tokens.",
            "About half of all rows at the start; falls to few.",
            f"{card}_like_unseen",
        ),
        Scalar(
            f"{key}_small",
            f"{name}: small rows",
            "rows",
            "Rows below a tenth of the mean norm.",
            "0, or few.",
        ),
        Scalar(
            f"{key}_norm_by_count",
            f"{name}: norm against count",
            "correlation",
            "Pearson's correlation of a row's norm with the log of its count, over the rows that were used.",
            "Any value that is steady.",
        ),
        Scalar(
            f"{key}_mean_share",
            f"{name}: share of the mean row",
            "fraction",
            "Part of the sum of all squared norms that lies in the mean row.",
            "Small. Near 1, all rows are almost the same vector.",
        ),
        Scalar(
            f"{key}_mean_cosine",
            f"{name}: mean cosine",
            "",
            "Mean cosine of two different rows, over all pairs.",
            "Near 0. Near 1, all rows point in one direction.",
        ),
        Scalar(
            f"{key}_isotropy",
            f"{name}: isotropy",
            "",
            "(Σλ)² / (D·Σλ²) of the spectrum λ of the rows' covariance. 1 if all directions are alike.",
            "Below 1, and steady.",
        ),
        Scalar(
            f"{key}_spectrum",
            f"{name}: share of the largest directions",
            "fraction",
            "Part of the variance in the largest N % of the directions, N = 1, 2, 5, 10, 20, 50.",
            "Steady. If the top 1 % takes most of the variance, the rows collapse.",
            forms=("/topNpct",),
        ),
    )


SCALARS = (
    Scalar(
        "loss",
        "Training loss",
        "nats/token",
        "Mean cross-entropy of the step's global batch.",
        "Starts near ln V, 10.8 for 50,257 rows. Falls fast, then slowly. A jump that stays is a loss spike.",
        f"{TRAINING}/loss/train",
    ),
    Scalar(
        "val_loss",
        "Validation loss",
        "nats/token",
        "Mean cross-entropy on the validation windows. /CORPUS: of one corpus, if there are several.",
        "Close to the training loss. A gap that grows means overfitting: see epochs.",
        f"{TRAINING}/loss/val",
        ("", CORPUS),
    ),
    Scalar(
        "val_bits_per_byte",
        "Validation bits per byte",
        "bits/byte",
        "The validation loss in bits, per byte of the text that was scored. Comparable between tokenizers.",
        "Falls with the validation loss. A useful model is below a compressor such as xz on the same text.",
        f"{TRAINING}/loss/val_bits_per_byte",
        ("", CORPUS),
    ),
    Scalar(
        "val_loss_ema",
        "Validation loss of the average",
        "nats/token",
        "Validation loss of the running average of the weights (ema.decay).",
        "Below val_loss while the learning rate is high; both meet as it falls.",
        forms=("", CORPUS),
    ),
    Scalar(
        "val_bits_per_byte_ema",
        "Validation bits per byte of the average",
        "bits/byte",
        "Validation bits per byte of the running average of the weights (ema.decay).",
        "As val_loss_ema.",
        forms=("", CORPUS),
    ),
    Scalar(
        "task",
        "Tasks",
        "",
        "Measures of the tasks in eval.tasks, as lm-eval defines them. /TASK: names of a task and of a measure, such as"
        " task/arc_easy/acc.",
        "acc: rises from that of a guess. Perplexities fall.",
        forms=(TASK,),
    ),
    Scalar(
        "lr",
        "Learning rate",
        "",
        "Learning rate of the step. With optim.vocab.lr: that of the body.",
        "Rises for optim.warmup_steps, then follows optim.schedule.",
        f"{TRAINING}/lr",
    ),
    Scalar(
        "grad_norm",
        "Gradient norm",
        "",
        "Norm of the gradient of all parameters, before it is clipped to optim.clip.",
        "High in the warm-up, then steady and mostly below optim.clip. Many peaks often come before a loss spike.",
        f"{TRAINING}/norm/gradient",
    ),
    Scalar(
        "mfu",
        "Model FLOPs utilization",
        "fraction",
        "FLOPs that the model needs for the trained tokens, head included, over the peak of all devices in that time:"
        " docs/training.md has the formula. Only on a GPU whose peak is known.",
        "Steady. 0.3 to 0.5 is common for large models in bf16; a small model reaches less.",
        f"{TRAINING}/perf/mfu",
    ),
    Scalar(
        "peak_memory_gib",
        "Peak memory",
        "GiB",
        "Most memory that any rank has held so far: allocated on its GPU, or resident on its host.",
        "Flat after the first steps, and below the memory of the device. A rise to the end is a leak.",
        f"{TRAINING}/perf/peak_memory_gib",
    ),
    Scalar(
        "step_s",
        "Step time",
        "s",
        "Mean wall time of a step since the last logged step, without evaluation, monitors, log and saves. /PART: of"
        " one part of the logged step alone, on rank 0: data (also waits for the other ranks), forward, head, backward,"
        " optimizer, hooks.",
        "Steady. Single peaks come from the data or the network. The head's part is about its share of the FLOPs.",
        f"{TRAINING}/perf/step_s",
        ("", PART),
    ),
    Scalar(
        "tokens_per_s",
        "Throughput",
        "tokens/s",
        "Targets of all ranks per second of the steps since the last logged step.",
        "Steady.",
        f"{TRAINING}/perf/tokens_per_s",
    ),
    Scalar(
        "tokens_per_s_per_rank",
        "Throughput per rank",
        "tokens/s",
        "tokens_per_s over the number of ranks.",
        "Steady, and about the same on more ranks.",
        f"{TRAINING}/perf/tokens_per_s_per_rank",
    ),
    Scalar(
        "epochs",
        "Epochs",
        "epochs",
        "How many times the training data was read. /CORPUS: of each corpus, if there are several.",
        "Below 1 for large corpora. Above about 4, repeated data helps little.",
        f"{DATA}/epochs",
        ("", CORPUS),
    ),
    Scalar(
        "lookup_saved",
        "Lookup traffic saved",
        "fraction",
        "How much less the embedding lookup moved between ranks than a gather and a reduce-scatter would. Only if ranks"
        " share a matrix.",
        "Above 0. It is larger if batches repeat tokens.",
        f"{DATA}/lookup_saved",
    ),
    Scalar(
        "tokens",
        "Tokens",
        "tokens",
        "Targets that the run has trained on.",
        "A straight line.",
    ),
    Scalar(
        "data_wait",
        "Waiting for data",
        "fraction",
        "Part of the step time in which the step waited for its batch.",
        "Near 0. Above 0.05, raise data.prefetch or use a faster disk.",
        f"{DATA}/wait",
    ),
    Scalar(
        "guard_spikes",
        "Guard: spikes",
        "spikes",
        "Batches that spiked since the last finished step, this step's included. Logged only after a spike.",
        "Absent. restarts.jsonl has the samples, documents and rows of each.",
    ),
    Scalar(
        "guard_left_out",
        "Guard: samples left out",
        "samples",
        "Samples that the guard has left out so far. Logged with guard_spikes.",
        "A small part of all samples.",
    ),
    Scalar(
        "guard_rollbacks",
        "Guard: rollbacks",
        "rollbacks",
        "Times that the guard has returned to an earlier checkpoint so far. Logged with guard_spikes.",
        "0. Several close together: lower optim.lr.",
    ),
    Scalar(
        "communication_s",
        "Exposed communication",
        "s",
        "Time of the logged step in which rank 0 waited for collectives. It is included in the parts of step_s. Only on"
        " a CPU: on a GPU, python -m pretrain.profile shows it.",
        "Small against step_s. It also has the time in which a fast rank waits for a slow one.",
    ),
    Scalar(
        "lookup_balance",
        "Lookup balance",
        "",
        "Rows that the busiest owner sent in the step, as a multiple of the mean. Only if ranks share a matrix.",
        "Near 1. It is p if one of p ranks owns every row that was looked up.",
    ),
    Scalar(
        "grad_cosine",
        "Cosine of the two gradients",
        "",
        "Cosine between the gradient that the rows get as input and as output, all rows as one vector."
        " /BIN: of one frequency bin.",
        "Near 0. Below 0, the two uses of a tied matrix pull apart.",
        f"{MATRIX}/grad_cosine",
        ("", BIN),
    ),
    Scalar(
        "grad_input_share",
        "Input's share of the gradient",
        "fraction",
        "grad_input / (grad_input + grad_output). /BIN: of one frequency bin.",
        "Steady. Near 0, the matrix learns from its output alone.",
        f"{MATRIX}/grad_input_share",
        ("", BIN),
    ),
    Scalar(
        "grad_input",
        "Gradient of the input",
        "",
        "Norm of the gradient that the rows get as input, before the clip. /BIN: of one frequency bin.",
        "Steady after the warm-up.",
        forms=("", BIN),
    ),
    Scalar(
        "grad_output",
        "Gradient of the output",
        "",
        "Norm of the gradient that the rows get as output, before the clip. /BIN: of one frequency bin.",
        "Steady after the warm-up.",
        forms=("", BIN),
    ),
    Scalar(
        "tie_distance",
        "Distance of the split matrices",
        "",
        "‖head − embedding‖ / ‖embedding‖, after vocab.untie_at.",
        "Rises from 0, then levels off.",
        f"{MATRIX}/tie_distance",
    ),
    Scalar(
        "tie_cosine",
        "Cosine of the split matrices",
        "",
        "Mean over the rows of the cosine between a row of the embedding and the same row of the head, after"
        " vocab.untie_at.",
        "Falls from 1, then levels off.",
        f"{MATRIX}/tie_cosine",
    ),
    Scalar(
        "rows_never_input",
        "Rows never used as input",
        "rows",
        "Rows that have never been an input token of this run.",
        "Falls. Rows that stay were never trained as input.",
        f"{MATRIX}/rows_never_input",
    ),
    Scalar(
        "rows_never_target",
        "Rows never used as target",
        "rows",
        "Rows that have never been a target of this run.",
        "Falls. Rows that stay are only pushed down by the softmax.",
    ),
    Scalar(
        "rows_of_bin",
        "Rows per frequency bin",
        "rows",
        "Rows in each frequency bin. The bins count uses in a million, as input or as target.",
        "Moves from `never` to the other bins, then is steady.",
        forms=(BIN,),
    ),
    *_of_matrix("embedding", "Embedding"),
    *_of_matrix("head", "Head"),
    Scalar(
        "lens_commitment",
        "Commitment depth",
        "fraction",
        "How far up the guess becomes the final one for good: 0 at the input, 1 at the output. /BIN: by the frequency"
        " of the input token.",
        "Between 0 and 1. At 1, the model decides in its last block.",
        f"{LENS}/commitment",
        ("", BIN),
    ),
    Scalar(
        "lens_preserved",
        "Input preserved",
        "fraction",
        "Part of the layers between input and output in which the input token is among the ten likeliest. /BIN: by the"
        " frequency of the input token.",
        "Falls early, then is steady.",
        f"{LENS}/preserved",
        ("", BIN),
    ),
    Scalar(
        "lens_seconds",
        "Time of the lens",
        "s",
        "Time that one measurement of the lens took.",
        "Small against the time of monitor.lens_every steps.",
    ),
    Scalar(
        "lens_kl_final",
        "Lens: KL from the output",
        "nats",
        "KL(output ‖ layer), of what each layer would predict.",
        "Falls from the input to the output.",
        forms=(LAYER,),
    ),
    Scalar(
        "lens_kl_input",
        "Lens: KL from the input",
        "nats",
        "KL(input ‖ layer), of what each layer would predict.",
        "Rises from the input to the output.",
        forms=(LAYER,),
    ),
    Scalar(
        "lens_entropy",
        "Lens: entropy",
        "nats",
        "Entropy of what each layer would predict.",
        "Falls in training, most at the output.",
        forms=(LAYER,),
    ),
    Scalar(
        "lens_loss",
        "Lens: loss of each layer",
        "nats/token",
        "Loss on the next token, of what each layer would predict.",
        "Falls in training, and from the input to the output.",
        forms=(LAYER,),
    ),
    Scalar(
        "lens_rank_final",
        "Lens: rank of the final guess",
        "rank",
        "Geometric mean of the rank, in each layer, of the output's top guess. 1 is the top.",
        "Falls to 1 at the output.",
        forms=(LAYER,),
    ),
    Scalar(
        "lens_rank_input",
        "Lens: rank of the input token",
        "rank",
        "Geometric mean of the rank, in each layer, of the input token. 1 is the top.",
        "Rises from the input to the output.",
        forms=(LAYER,),
    ),
    Scalar(
        "lens_kl_input_by_frequency",
        "Lens: KL from the input, by frequency",
        "nats",
        "lens_kl_input by the frequency of the input token.",
        "As lens_kl_input.",
        forms=(BIN + LAYER,),
    ),
    Scalar(
        "lens_rank_input_by_frequency",
        "Lens: rank of the input token, by frequency",
        "rank",
        "lens_rank_input by the frequency of the input token.",
        "As lens_rank_input.",
        forms=(BIN + LAYER,),
    ),
)

BY_KEY = {scalar.key: scalar for scalar in SCALARS}


def tag_of(key: str) -> str:
    """The tag in TensorBoard of a key of metrics.jsonl. An unknown key, such as one of your own hooks, is its tag."""
    scalar = BY_KEY.get(key.partition("/")[0])
    if scalar is None:
        return key
    return scalar.tag if key == scalar.key else f"{DETAILS}/{key}"


def map_tag(name: str) -> str:
    """The tag of a heat map of the lens, by the name of what it shows."""
    return f"{LENS}/map/{name}"


BEST = {key: f"{DETAILS}/best_{key}" for key in ("val_loss", "val_bits_per_byte")}  # in TensorBoard only: the lowest
