"""The command line of the converters: `python -m data_prep.formats --help`."""

import glob
from pathlib import Path

from data_prep.arguments import key_values
from data_prep.command import arguments_or, one_line
from data_prep.errors import DataError
from data_prep.formats.layouts import LAYOUTS, Layout
from data_prep.formats.transfer import export_tokens, import_tokens, is_of_validation
from data_prep.progress import working
from data_prep.tokenizer import Tokenizer

HELP = """Converts the token files of other programs to ours and back.

  python -m data_prep.formats import from=llmc in='fineweb10B/*.bin' tokenizer=gpt2 out=data/fineweb
  python -m data_prep.formats import from=datatrove in=tokenized/ tokenizer=data/mine/tokenizer out=data/theirs
  python -m data_prep.formats export to=nanogpt in=data/mine out=data/mine_nanogpt

  from=, to=    megatron    .bin and .idx, also from NeMo, GPT-NeoX and nanotron. They read our files as they are
                llmc        .bin with a header (llm.c, modded-nanogpt): uint16, or uint32 for more than 65,536 rows
                datatrove   .ds, .ds.index, .ds.metadata
                nanogpt     train.bin and val.bin: uint16 without a header
  in=           import: a file, a pattern, a folder, or [one,another]; for .bin and .idx, either file or their prefix.
                Files with val in the name (val.bin, fineweb_val_000000.bin) become the validation split
                export: a folder made by data_prep/tokenize.py or by an import
  tokenizer=    import: the tokenizer that made the tokens: a folder with ranks.tiktoken and spec.json, or a name that
                tiktoken knows. A sample is decoded and encoded again to check it
  out=          a new folder, which appears when it is complete. Nothing is overwritten
"""
KEYS = {
    "from": "import: format of the files: megatron, llmc, datatrove or nanogpt",
    "to": "export: format to write: the same",
    "in": "files to read: a file, a pattern, a folder or a list; export: a folder of token files",
    "tokenizer": "import: tokenizer of the tokens: a folder that has one, or a name that tiktoken knows",
    "out": "new folder to write",
}


def main() -> None:
    """Runs the command; exits 0, or 2 with one line that says what is wrong."""
    with one_line(remark="; nothing was kept"):
        arguments = arguments_or(HELP)
        run(arguments)


def run(arguments: list[str]) -> None:
    command, *settings = arguments
    if command == "import":
        given = _given(settings, "from", "in", "tokenizer", "out")
        layout, out = _layout("from", given["from"]), Path(given["out"])
        files = _files(layout, given["in"])
        val = [path for path in files if is_of_validation(path)]
        train = [path for path in files if path not in val]
        with working("import"):
            manifest = import_tokens(layout, train, val, _tokenizer(given["tokenizer"]), out)
        print(f"imported: {manifest.summary(out)}")
    elif command == "export":
        given = _given(settings, "to", "in", "out")
        with working("export"):
            manifest = export_tokens(_layout("to", given["to"]), Path(given["in"]), Path(given["out"]))
        print(f"exported: {manifest.summary(Path(given['out']))}")
    else:
        raise DataError(f"{command} must be import or export; see --help")


def _given(settings: list[str], *keys: str) -> dict[str, str]:
    given = key_values(settings, keys, f"key=value, the key one of {', '.join(keys)}")
    for key in keys:
        if not given.get(key):
            raise DataError(f"{key}= must be given; see --help")
    return given


def _layout(key: str, name: str) -> Layout:
    if name not in LAYOUTS:
        raise DataError(f"{key}={name} must be one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _files(layout: Layout, given: str) -> list[Path]:
    """The files that `given` lists: in that order, sorted by name within an item."""
    files: list[Path] = []
    for item in given.removeprefix("[").removesuffix("]").split(","):
        if not item:
            raise DataError(f"in={given}: an entry of the list is empty")
        found = [item] if Path(item).exists() else sorted(glob.glob(item, recursive=True))
        if not found and layout.name == "megatron" and Path(f"{item}.idx").exists():
            found = [f"{item}.idx"]
        if not found:
            raise DataError(f"in={item}: no such file, and no match for the pattern")
        for path in map(Path, found):
            if path.is_dir():
                inside = sorted(path.glob(f"*{layout.suffix}"))
                if not inside:
                    raise DataError(f"in={path} contains no file *{layout.suffix}")
                files += inside
            else:
                files.append(path.with_suffix(layout.suffix) if path.suffix == ".bin" else path)
    return list(dict.fromkeys(files))


def _tokenizer(given: str) -> Tokenizer:
    return Tokenizer.load(given) if Path(given).is_dir() else Tokenizer.named(given)


if __name__ == "__main__":
    main()
