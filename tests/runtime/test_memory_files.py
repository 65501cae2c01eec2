import re

import numpy as np
import pytest

from anncvt.runtime.memory_files import c_array, c_name, coe, file_name, hex_lines


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64"])
def test_hex_and_coe_hold_every_number_in_twos_complement(dtype):
    info = np.iinfo(dtype)
    values = np.array([[info.min, info.max], [0, info.max // 3]], dtype)
    lines = hex_lines(values).splitlines()
    assert {len(line) for line in lines} == {2 * values.itemsize}
    unsigned = np.array([int(line, 16) for line in lines], f"uint{8 * values.itemsize}")
    assert np.array_equal(unsigned.view(dtype), values.ravel())
    text = coe(values)
    assert text.startswith("memory_initialization_radix=16;\n")
    assert re.findall(r"^([0-9a-f]+)[,;]$", text, re.MULTILINE) == lines


def test_c_arrays_say_what_they_hold():
    text = c_array("bias", np.array([-(2**40), 5], np.int64))
    assert text == "static const int64_t bias[2] = {\n    INT64_C(-1099511627776), INT64_C(5)\n};\n"
    assert "uint8_t w[4]" in c_array("w", np.zeros((2, 2), np.uint8))


def test_names_are_safe():
    assert file_name(3, "a/b@4 c") == "003_a_b_4_c"
    assert c_name(12, "layer1.0.conv1") == "layer_012_layer1_0_conv1"
