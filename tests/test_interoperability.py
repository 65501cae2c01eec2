"""The table of docs/onnx.md is what the tools do today, and how it is written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import interoperability
from interoperability import TOOLS, Case, Tool

#: Of the project's own dependencies, and quick.
QUICK = {"onnx", "onnx-ir", "onnxscript", "onnxruntime"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return interoperability.cases(tmp_path_factory.mktemp("exported"))


def case_of(tool):
    marks = [] if tool.package in QUICK else [pytest.mark.slow]
    return pytest.param(tool, marks=marks, id=f"{tool.package}: {tool.name}")


@pytest.mark.parametrize("tool", [case_of(tool) for tool in TOOLS])
def test_the_table_is_current(tool, found, tmp_path):
    if not tool.usable:
        pytest.skip(f"{tool.package} is not installed")
    assert interoperability.documented()[tool.package, tool.name] == interoperability.row(tool, found, tmp_path)


def test_the_table_has_every_tool_and_no_other():
    assert list(interoperability.documented()) == [(tool.package, tool.name) for tool in TOOLS]


def test_what_becomes_of_a_file_is_told(found, tmp_path):
    def lose(source, target, case):
        model = interoperability.onnx.load(source)
        del model.functions[:]
        interoperability.onnx.save(model, target)

    def fail(source, case):
        raise ValueError

    def cell(**how):
        return Tool("tool", "onnx", **how).cell(found["floats"], tmp_path)

    assert cell(rewrite=lose) == "kept, **definition dropped**"
    assert cell(read=fail) == "refused"
    assert cell(read=lambda source, case: None) == "valid"
    assert cell(read=lambda source, case: -case.logits) == "**wrong logits**"


@pytest.mark.parametrize(("exact", "near"), [(False, "same logits"), (True, "logits within a tenth")])
def test_integers_have_to_be_equal_bit_for_bit(exact, near):
    case = Case({}, np.zeros(0), np.array([[1.0, -2.0]], np.float32), exact)
    assert case.judge(case.logits.copy()) == ("bit for bit" if exact else "same logits")
    assert case.judge(case.logits * np.float32(1.00001)) == near
    assert case.judge(case.logits * np.float32(1.05)) == "logits within a tenth"
    assert case.judge(case.logits * np.float32(1.5)) == "**wrong logits**"
