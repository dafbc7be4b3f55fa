"""The public names: each exists, says what it is for, and costs nothing before it is used."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import stream_lens


@pytest.mark.parametrize("name", stream_lens.__all__)
def test_a_public_name_exists_and_says_what_it_takes(name):
    thing = getattr(stream_lens, name)
    if inspect.isroutine(thing) or inspect.isclass(thing):
        assert thing.__name__ == name
        assert thing.__doc__
        # A dataclass without a docstring gets its signature for one.
        assert not thing.__doc__.startswith(f"{name}(")
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        bare = [taken.name for taken in signature.parameters.values() if taken.annotation is taken.empty]
        assert not bare, f"not annotated: {', '.join(bare)}"
        assert signature.return_annotation is not signature.empty
    assert name in dir(stream_lens)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = stream_lens.no_such_name


def test_importing_the_package_loads_nothing_large():
    code = "import sys, stream_lens; print({'torch', 'transformers', 'transformer_lens', 'plotly'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"
