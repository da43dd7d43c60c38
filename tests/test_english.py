"""What the check of words finds, and what it leaves alone."""

import pytest

from tests.english import findings

PLAIN = '''"""Splits a matrix by rows."""

def rows(n):
    """Returns the number of rows. Raises ValueError if n is negative."""
    return n  # at least one per rank
'''


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("plain.py", PLAIN, []),
        ("first.py", PLAIN.replace("Returns", "Of n"), [(4, "Of …")]),
        ("error.py", PLAIN.replace("ValueError if", "ValueError where"), [(4, "Error where")]),
        ("comment.py", PLAIN.replace("at least one", "so many"), [(5, "so many")]),
        ("excused.py", PLAIN.replace("at least one", "so many, english: quoted"), []),
        ("message.py", 'raise ValueError(f"{n} is no number")\n', [(1, "is no number")]),
        ("wrapped.py", '"""Ends the run.\n\nIt is gone\non with later.\n"""\n', [(3, "gone\non with")]),
        ("page.md", "# Title\n\nThe rest starts anew.\n", [(3, "anew")]),
        ("conf.yaml", "anew: 1  # starts anew\n", [(1, "anew")]),
        ("data.txt", "so many\n", []),
    ],
)
def test_words_to_write_plainly_are_found_with_their_line(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert [(line, words) for line, words, _ in findings(tmp_path / name)] == expected
