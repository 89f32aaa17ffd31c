"""The macOS wheel, built and linked on Linux; `-m macos` selects the tests that compile."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the macOS wheel is cross-compiled on Linux only", allow_module_level=True)

import lief
from shader_texts import flatten
from sim.macos import build, check, macho, mlx_wheels, providers
from sim.macos.__main__ import build_and_check
from sim.macos.errors import MacOSBuildError

PYTHON = f"{sys.version_info.major}{sys.version_info.minor}"

# csrc/metal calls these functions of MLX's host code.
HOST_CALLS = [
    "device",
    "get_command_encoder",
    "Device::get_library",
    "Device::get_kernel",
    "CommandEncoder::set_input_array",
    "CommandEncoder::set_output_array",
    "CommandEncoder::dispatch_threadgroups",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_and_check(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built[0]) as archive:
        yield archive


@pytest.fixture(scope="module")
def extension(wheel, tmp_path_factory):
    (name,) = (n for n in wheel.namelist() if n.endswith(".so"))
    return Path(wheel.extract(name, tmp_path_factory.mktemp("extension")))


@pytest.fixture(scope="module")
def mlx():
    return mlx_wheels.fetch(build.pinned_mlx())


@pytest.mark.macos
def test_every_symbol_has_a_provider(built):
    _, count = built
    assert count[providers.LIBMLX] > 0
    assert count[providers.LIBCXX] > 0
    assert count[providers.PYTHON] > 0


@pytest.mark.macos
def test_the_check_accepts_an_extension_made_on_a_mac(mlx):
    (core,) = mlx.glob("mlx/core.*.so")
    assert check.undefined_by_provider(core, mlx)[providers.LIBMLX] > 300


@pytest.mark.macos
def test_the_launchers_host_calls_are_among_them(extension, mlx):
    exported = macho.exported(macho.parse(mlx / "mlx/lib/libmlx.dylib"))
    taken = {
        check.demangle(symbol).partition("(")[0]
        for symbol, library in macho.undefined(macho.parse(extension)).items()
        if library == providers.LIBMLX and symbol in exported
    }
    assert {f"mlx::core::metal::{name}" for name in HOST_CALLS} <= taken


@pytest.mark.macos
def test_the_shaders_are_inside(extension, mlx):
    content = extension.read_bytes()
    shaders = sorted((build.REPOSITORY / "metal").glob("*.metal"))
    assert shaders
    for shader in shaders:
        assert flatten.flatten(shader.stem, mlx / "mlx/include").encode() in content, shader.name


@pytest.mark.macos
def test_every_source_for_arm64_is_compiled(built):
    csrc = build.REPOSITORY / "csrc"
    found = {Path(c["file"]) for c in compile_commands()} & set(csrc.rglob("*.cpp"))
    elsewhere = {*csrc.rglob("*_avx2.cpp"), *csrc.rglob("*_avx512.cpp")}
    assert elsewhere
    assert set(csrc.rglob("*.cpp")) - found == elsewhere | {csrc / "metal/absent.cpp"}


@pytest.mark.macos
def test_a_host_call_that_mlx_does_not_have_is_named(built, mlx, tmp_path):
    """A launcher is compiled against a get_kernel that takes one argument more than libmlx's."""
    header = "mlx/backend/metal/device.h"
    declared = "get_kernel(\n      const std::string& base_name,\n      MTL::Library* mtl_lib,\n"
    text = (mlx / "mlx/include" / header).read_text()
    assert text.count(declared) == 1
    changed = tmp_path / header
    changed.parent.mkdir(parents=True)
    changed.write_text(text.replace(declared, f"{declared}      bool = false,\n"))
    broken = relink(build.REPOSITORY / "csrc/metal/pipelines.cpp", tmp_path)
    with pytest.raises(MacOSBuildError) as error:
        check.undefined_by_provider(broken, mlx)
    message = str(error.value)
    assert "needs 1 symbol(s)" in message
    name = "mlx::core::metal::Device::get_kernel(std::__1::basic_string<"
    assert f"\n  {name}" in message
    assert "const&, MTL::Library*, bool, std" in message
    offered = [line for line in message.splitlines() if f"libmlx has {name}" in line]
    assert any("const&, MTL::Library*, std" in line for line in offered)


def compile_commands():
    return json.loads((build.cmake_dir() / "compile_commands.json").read_text())


def relink(source: Path, headers: Path) -> Path:
    """Link the extension with one source compiled anew; headers in `headers` come first."""
    folder, env = build.cmake_dir(), build.environment()
    (command,) = (c for c in compile_commands() if c["file"] == str(source))
    compiler, *flags = shlex.split(command["command"])
    changed, linked = headers / "changed.o", headers / "_ext.so"
    at = flags.index("-o") + 1
    original, flags[at] = flags[at], str(changed)
    subprocess.run([compiler, f"-I{headers}", *flags], cwd=folder, env=env, check=True)
    commands = subprocess.check_output(["ninja", "-C", folder, "-t", "commands"], text=True)
    link = shlex.split(commands.splitlines()[-1])  # ": && c++ … && :"
    link = [str(changed) if word == original else word for word in link[2:-2]]
    assert str(changed) in link
    link[link.index("-o") + 1] = str(linked)
    subprocess.run(link, cwd=folder, env=env, check=True)
    return linked


@pytest.mark.macos
def test_the_binary_is_one_that_macos_14_loads(extension, mlx):
    binary = macho.parse(extension)
    version = binary.build_version
    assert version.platform == lief.MachO.BuildVersion.PLATFORMS.MACOS
    assert list(version.minos) == [14, 0, 0]
    assert [r.path for r in binary.rpaths] == ["@loader_path/../mlx/lib"]
    assert binary.has_code_signature  # an ad hoc one, as Apple silicon runs nothing unsigned
    assert "_PyInit__ext" in macho.exported(binary)
    # The libraries that MLX itself loads are on every Mac that runs it.
    allowed = {providers.LIBMLX, *macho.libraries(macho.parse(mlx / "mlx/lib/libmlx.dylib"))}
    assert (
        {providers.LIBMLX, providers.LIBCXX, providers.LIBSYSTEM}
        <= set(macho.libraries(binary))
        <= allowed
    )


@pytest.mark.macos
def test_no_path_of_this_machine_is_left_in_the_binary(extension):
    content = extension.read_bytes()
    for path in (build.REPOSITORY, mlx_wheels.cache_dir(), Path.home(), Path(sys.prefix)):
        assert str(path).encode() not in content


@pytest.mark.macos
def test_the_file_name_and_its_tags_agree(built, wheel, extension):
    tag = f"cp{PYTHON}-cp{PYTHON}-macosx_14_0_arm64"
    (info,) = (n for n in wheel.namelist() if n.endswith(".dist-info/WHEEL"))
    assert built[0].name.endswith(f"-{tag}.whl")
    assert f"Tag: {tag}\n" in wheel.read(info).decode()
    assert "Root-Is-Purelib: false" in wheel.read(info).decode()
    assert extension.name == f"_ext.cpython-{PYTHON}-darwin.so"


@pytest.mark.macos
@pytest.mark.parametrize(
    ("platform", "taken"),
    [
        ("macosx_14_0_arm64", True),
        ("macosx_26_0_arm64", True),
        ("macosx_13_0_arm64", False),
        ("macosx_14_0_x86_64", False),
        ("manylinux_2_35_x86_64", False),
    ],
)
def test_pip_installs_it_on_apple_silicon_from_macos_14_on(built, tmp_path, platform, taken):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile"]
    command += ["--target", tmp_path, "--only-binary=:all:", "--platform", platform, built[0]]
    run = subprocess.run(command, text=True, capture_output=True, check=False)
    assert (run.returncode == 0) == taken, run.stderr
    assert taken or "is not a supported wheel on this platform" in run.stderr
    assert len(list(tmp_path.glob("glm_fused/_ext.*.so"))) == taken


@pytest.mark.macos
def test_nothing_of_linux_is_inside(wheel, extension):
    compiled = [n for n in wheel.namelist() if n.endswith((".so", ".dylib", ".a", ".o"))]
    assert compiled == [f"glm_fused/{extension.name}"]
    assert [n for n in wheel.namelist() if wheel.read(n)[:4] == b"\x7fELF"] == []
    libraries = macho.libraries(macho.parse(extension))
    assert [n for n in libraries if not n.startswith(("/usr/lib/", "/System/", "@rpath/"))] == []


@pytest.mark.macos
def test_the_record_is_true(wheel):
    (record,) = (n for n in wheel.namelist() if n.endswith(".dist-info/RECORD"))
    rows = [line.split(",") for line in wheel.read(record).decode().splitlines()]
    assert {name for name, _, _ in rows} == set(wheel.namelist())
    for name, digest, size in rows:
        if name != record:
            data = wheel.read(name)
            sha = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={sha}", len(data))


@pytest.mark.macos
def test_all_but_the_extension_is_what_linux_gets(wheel, extension, tmp_path):
    settings = json.dumps({"wheel.cmake": "false", "wheel.platlib": "true"})
    subprocess.run(
        [sys.executable, "-c", build.BUILD_WHEEL, tmp_path, settings],
        cwd=build.REPOSITORY,
        check=True,
    )
    (linux,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(linux) as archive:
        expected = {n: archive.getinfo(n).CRC for n in archive.namelist()}
    found = {n: wheel.getinfo(n).CRC for n in wheel.namelist()}
    assert found.keys() - expected.keys() == {f"glm_fused/{extension.name}"}
    assert expected.keys() <= found.keys()
    own = ("/WHEEL", "/RECORD")
    assert all(found[n] == crc for n, crc in expected.items() if not n.endswith(own))


def test_without_a_network_there_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("GLM_FUSED_MACOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for variable in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    version = build.pinned_mlx()
    with pytest.raises(MacOSBuildError) as error:
        mlx_wheels.fetch(version)
    assert f"cannot download mlx=={version} and mlx-metal=={version}" in str(error.value)
    assert "needs the network once" in str(error.value)
    assert str(tmp_path / "cache") in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []
