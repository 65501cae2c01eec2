import sys
from pathlib import Path

import pytest
import torch

from anncvt.architecture import instantiate, parse_arch_args
from anncvt.errors import AnncvtError

CODE = """
import torch
NUMBER = 3
def make(n=1):
    return torch.nn.Conv2d({channels}, n, 3)
def text():
    return "x"
"""


def module(folder: Path, name: str, channels: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(CODE.format(channels=channels))
    return folder


def test_arguments_are_literals_where_they_are():
    given = ["n=3", "p=0.5", "flag=True", "off=false", "none=None", "act=relu", "size=(1, 2)", "eq=a=b", "e="]
    assert parse_arch_args(given) == {
        "n": 3, "p": 0.5, "flag": True, "off": False, "none": None, "act": "relu", "size": (1, 2), "eq": "a=b", "e": "",
    }  # fmt: skip


@pytest.mark.parametrize("value", ["n", "=3", "a b=3", "3=n"])
def test_bad_arguments(value):
    with pytest.raises(AnncvtError, match="NAME=VALUE"):
        parse_arch_args([value])


def test_an_installed_module_needs_no_folder():
    network, folder = instantiate("torch.nn:Conv2d", {"in_channels": 1, "out_channels": 2, "kernel_size": 3})
    assert isinstance(network, torch.nn.Conv2d) and folder is None


def test_folders_are_searched_in_order_and_leave_no_trace(tmp_path):
    first, second = module(tmp_path / "a", "anncvt_net_a"), module(tmp_path / "b", "anncvt_net_a", 5)
    before = list(sys.path)
    network, folder = instantiate("anncvt_net_a:make", {"n": 2}, [tmp_path, first, second])
    assert network.in_channels == 3 and network.out_channels == 2 and folder == str(first)
    assert sys.path == before


def test_a_file_of_the_same_name_elsewhere_is_another_module(tmp_path):
    first, second = module(tmp_path / "a", "anncvt_net_b"), module(tmp_path / "b", "anncvt_net_b", 5)
    assert instantiate("anncvt_net_b:make", {}, [first])[0].in_channels == 3
    assert instantiate("anncvt_net_b:make", {}, [second])[0].in_channels == 5


def test_packages_and_nested_names(tmp_path):
    module(tmp_path / "anncvt_pkg", "inner")
    (tmp_path / "anncvt_pkg" / "__init__.py").write_text("")
    assert instantiate("anncvt_pkg.inner:make", {}, [tmp_path])[1] == str(tmp_path)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet", "has no ':'"),
        ("no_such_module:make", "no module 'no_such_module'"),
        ("anncvt_net_c:nothing", "has no 'nothing'"),
        ("anncvt_net_c:NUMBER", "a int, not a class or function"),
        ("anncvt_net_c:text", "makes no torch.nn.Module but: str"),
        ("anncvt_net_c:make", "could not be built: TypeError"),
        ("../x:make", "not the name of a Python object"),
        ("anncvt_broken:make", "ZeroDivisionError"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, arch, message):
    module(tmp_path, "anncvt_net_c")
    (tmp_path / "anncvt_broken.py").write_text("1 / 0")
    with pytest.raises(AnncvtError, match=message) as error:
        instantiate(arch, {"surprise": 1} if arch.endswith(":make") else {}, [tmp_path])
    assert error.value.fix


def test_what_a_module_has_is_listed(tmp_path):
    with pytest.raises(AnncvtError) as error:
        instantiate("anncvt_net_d:mak", {}, [module(tmp_path, "anncvt_net_d")])
    assert "make" in error.value.fix
