"""Carry packages to a GPU machine without a network, in parts of at most 48 MiB.

    python results/gpu_pack.py pack .gpu             here: download, pack, split
    python results/gpu_pack.py pack .gpu --no-vllm   only the small ones that train.py needs
    python3 results/gpu_pack.py join .gpu --to DIR   there: check, unpack; then PYTHONPATH=DIR

For a machine with Python 3.12, torch 2.11, transformers 5.17, triton 3.6 and the usual scientific packages;
vLLM 0.26.0 is the one that was built for that torch.  `join` finds the parts in the given folders.

Of vLLM's wheel stay behind: FlashAttention 2 (Hopper runs version 3), the Rust front end, kernels for
Blackwell and for QuTLASS.  Each is imported only where it is used.  tar.xz with one dictionary for the small
wheels and the large one: 290 MiB become about 115.
"""

import argparse
import hashlib
import io
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PART = 48 * 2**20
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64", "any"]
OURS = "tyro docstring-parser typeguard gguf math-verify==0.9.0 latex2sympy2-extended"
OURS += " antlr4-python3-runtime==4.13.2 datasets dill multiprocess"
VLLM = """vllm==0.26.0 pydantic pydantic-core typing-inspection fastapi==0.136.3 starlette msgspec pyzmq cbor2
blake3 cachetools openai jiter distro openai-harmony xgrammar llguidance==1.7.6 apache-tvm-ffi
compressed-tensors==0.17.0 loguru partial-json-parser pybase64 python-json-logger setproctitle ijson
watchfiles lark==1.2.2 outlines_core==0.2.14 lm-format-enforcer==0.11.3 interegular depyf==0.20.0 astor
opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions opentelemetry-proto
opentelemetry-exporter-otlp opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-grpc
opentelemetry-exporter-otlp-proto-http opentelemetry-semantic-conventions-ai googleapis-common-protos
prometheus-fastapi-instrumentator uvicorn httptools websockets python-multipart email-validator dnspython
pydantic-extra-types pydantic-settings jsonschema jsonschema-specifications referencing rpds-py sniffio
truststore jmespath model-hosting-container-standards supervisor python-dotenv nvtx==0.2.15 sse-starlette mcp
anthropic httpx-sse httpx2 httpcore2 annotated-types mcp-types pyjwt mistral-common pycountry
opentelemetry-exporter-otlp-common opentelemetry-exporter-http-transport"""
BEHIND = (
    "vllm/vllm_flash_attn/_vllm_fa2_C",
    "vllm/vllm-rs",
    "vllm/third_party/fmha_sm100/",
    "vllm/_qutlass_C",
)


def download(name: str, into: Path) -> str:
    """'' or what pip said."""
    how = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", "--no-deps"]
    how += [x for p in PLATFORMS for x in ("--platform", p)] + ["--quiet", "--dest", str(into)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *how, name], capture_output=True, text=True
    )
    return "" if done.returncode == 0 else f"{name}: {done.stderr.strip().splitlines()[-1]}"


def pack(folder: Path, vllm: bool) -> None:
    """Wheels into one tar.xz, laid out as in site-packages, split into part-00, ..., and parts.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys([*OURS.split(), *(VLLM.split() if vllm else [])])
    with tempfile.TemporaryDirectory() as wheels:
        with ThreadPoolExecutor(4) as pool:
            failed = list(filter(None, pool.map(lambda name: download(name, Path(wheels)), names)))
        print(*failed, sep="\n", file=sys.stderr)
        raw = Path(wheels) / "all.tar"
        with tarfile.open(raw, "w") as tar:
            for wheel in sorted(Path(wheels).glob("*.whl")):
                with zipfile.ZipFile(wheel) as zipped:
                    for item in zipped.infolist():
                        if item.is_dir() or item.filename.startswith(BEHIND) or ".data/" in item.filename:
                            continue
                        data, info = zipped.read(item), tarfile.TarInfo(item.filename)
                        info.size, info.mode = len(data), 0o755 if ".so" in item.filename else 0o644
                        tar.addfile(info, io.BytesIO(data))
        print(f"{raw.stat().st_size / 2**20:.0f} MiB unpacked; compressing takes minutes", file=sys.stderr)
        packed = lzma.compress(raw.read_bytes(), preset=6)
    split(folder, packed)


def split(folder: Path, data: bytes) -> None:
    parts = [data[i : i + PART] for i in range(0, len(data), PART)]
    for i, part in enumerate(parts):
        (folder / f"part-{i:02}").write_bytes(part)
    (folder / "parts.json").write_text(
        json.dumps({f"part-{i:02}": hashlib.sha256(x).hexdigest() for i, x in enumerate(parts)})
    )
    print(f"{len(parts)} parts, {len(data) / 2**20:.0f} MiB, in {folder}")


def join(folders: list[Path], to: Path) -> None:
    """Unpack under `to`.  Raises SystemExit where a part is missing or is not what was packed."""
    where = {path.name: path for folder in folders for path in folder.glob("part*")}
    data = b""
    for name, digest in json.loads(where["parts.json"].read_text()).items():
        part = where[name].read_bytes() if name in where else b""
        if hashlib.sha256(part).hexdigest() != digest:
            raise SystemExit(f"{name}: {'damaged' if part else 'missing'} in {', '.join(map(str, folders))}")
        data += part
    with tarfile.open(fileobj=lzma.open(io.BytesIO(data))) as tar:
        tar.extractall(to, filter="data")
    print(f"unpacked under {to}")


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("do", choices=("pack", "join"))
    parser.add_argument("folder", nargs="+", type=Path)
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--to", type=Path, default=Path("/tmp/site"))
    given = parser.parse_args()
    if given.do == "pack":
        pack(given.folder[0], not given.no_vllm)
    else:
        join(given.folder, given.to)


if __name__ == "__main__":
    main()
