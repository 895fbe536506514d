"""The command line on a CUDA device."""

import json

import pytest

import bitnet_ext as bx
from bitnet_ext.cli.app import run
from bitnet_ext.cli.failures import ExitCode
from bitnet_ext.errors import DeviceUnavailableError
from bitnet_ext.gpu.device import cuda_device


def shown_by(capsys, *arguments):
    assert run(list(arguments)) == 0
    return capsys.readouterr()


def test_info_estimates_what_the_device_needs(device, capsys):
    found = json.loads(shown_by(capsys, "info", "--device", "cuda", "--json").out)["model"]
    config = bx.BitNetConfig(**found["config"])
    wanted = bx.estimate_memory(config, 1, config.max_position_embeddings, "decode", device="cuda")
    assert found["memory_estimate"]["decode"]["total"] == wanted.total


def test_generate_and_bench_run_there(device, capsys):
    arguments = ("--prompt", "def f(", "-n", "2", "--temperature", "0")
    wanted = shown_by(capsys, "generate", *arguments).out
    shown = shown_by(capsys, "generate", "--device", "cuda", *arguments)
    assert shown.out == wanted
    assert device.name in shown.err
    shape = ("--preset", "tiny", "--prompt-tokens", "5", "--new-tokens", "2", "-r", "1")
    found = json.loads(shown_by(capsys, "bench", "--device", "cuda", *shape, "--json").out)
    assert found["machine"]["cuda"] == device.name
    assert {"prefill", "decode", "forward_full"} <= {r["test"] for r in found["results"]}


def test_a_device_that_is_absent(capsys):
    try:
        cuda_device()
    except DeviceUnavailableError:
        assert run(["generate", "--device", "cuda", "--prompt", "x"]) == ExitCode.DEVICE
        assert "device: found" in capsys.readouterr().err
    else:
        pytest.skip("this machine has a CUDA device")
