"""The README's Python runs as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_loop_of_the_readme_runs(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.match(r"\d+00 |0 ", line)]) == 10


def test_the_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parent.parent / name).is_file(), name
