"""Downloads: a stand-in for the NGC client on PATH, and one for the Hugging Face hub on 127.0.0.1.

The client's arguments, messages, folder and exit codes are those of NGC CLI 4; the hub's paths, headers and error codes
those of huggingface.co.
"""

import contextlib
import hashlib
import http.server
import json
import os
import pty
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemo_minitron.artifacts import Manifest
from nemo_minitron.config import DownloadConfig, validated
from nemo_minitron.conversion.download import download
from nemo_minitron.errors import CheckpointError, ConfigError, EngineError, MinitronError, OutputExistsError

CLIENT = r"""#!/bin/sh
if [ "$1 $2 $3 $5" != "registry model download-version --dest" ] || [ $# != 6 ]; then
    echo "ngc: error: unrecognized arguments: $*" >&2; exit 2
fi
[ -d "$6" ] || { echo "The path: '$6' does not exist." >&2; exit 1; }
name=${4##*/} model=${name%%:*} version=${name#*:}
fail() { printf '\033[91m%s\033[0m\n' "$1" >&2; exit 1; }
api="https://api.ngc.nvidia.com/v2/org/acme/models/$model"
guest="403 FORBIDDEN, detail='Artifact is not Guest accessible!'"
[ -n "$NGC_CLI_API_KEY" ] || fail "Client Error: 403 Response: $guest - Request Id: 2157ae64 Url: $api"
case $model in
    unknown) fail "Client Error: 404 Response: Not Found - Request Id: 2157ae64 Url: $api" ;;
    orgless) fail "Missing org - If Authenticated, org is also required." ;;
    terms) fail "Client Error: 412 Response: terms - Request Id: 2157ae64 Url: $api
Open the NGC catalog to accept terms, then retry:
https://catalog.ngc.nvidia.com/orgs/acme/models/$model" ;;
esac
printf '\033[2KGetting files to download...\n'
[ -t 1 ] && echo "progress of $COLUMNS columns"
made=$6/${model}_v${version}
umask 077
[ "$model" = missing ] || mkdir "$made"
status=Completed code=0
case $model in
    missing|empty) ;;
    notes) echo hello > "$made/README.md" ;;
    nemo2) mkdir "$made/context" "$made/weights" && echo 1 > "$made/weights/metadata.json" ;;
    own) echo '{"config.json": 1}' > "$made/manifest.json" && echo 1 > "$made/$model.nemo" ;;
    killed) echo half > "$made/$model.nemo"; kill -9 $$ ;;
    slow) echo half > "$made/$model.nemo"; echo $$ > "$PID_FILE"; exec sleep 60 ;;
    half) echo half > "$made/$model.nemo"; status="In Progress" code=5 ;;
    old) echo half > "$made/$model.nemo"; status=Incomplete ;;
    *) printf weights > "$made/$model.nemo" ;;
esac
printf '  ━━━━━━━━━━ • 7/7 B • Remaining: 0:00:00 • Total: 1 - Completed: 1 - Failed: 0\n\n'
echo "--------------------------------------------------"
echo "   Model ID: $model[version=$version]"
echo "   Download status: $status"
echo "   Downloaded local path model: $made"
echo "   Total files downloaded: 1"
echo "--------------------------------------------------"
exit $code
"""
SECRETS = ("NGC_CLI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current directory, without keys."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def client(tmp_path, monkeypatch, workplace):
    """The stand-in for `ngc`, first on PATH, and a key."""
    path = tmp_path / "bin" / "ngc"
    path.parent.mkdir()
    path.write_text(CLIENT)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NGC_CLI_API_KEY", "nvapi-x")
    return path


def fetch(source, **fields):
    return download(validated(DownloadConfig(source=source, **fields)))


def failure(error, source, **fields):
    with pytest.raises(error) as caught:
        fetch(source, **fields)
    return str(caught.value)


def minitron(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "nemo_minitron", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def all_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("source", ["ngc://acme/llama:1.0", "ngc://acme/team-a/llama:1.0"])
def test_ngc_puts_the_clients_folder_in_place(client, workplace, source):
    manifest = fetch(source)
    assert all_below(workplace) == ["llama_v1.0/llama.nemo", "llama_v1.0/manifest.json"]
    assert (workplace / "llama_v1.0/llama.nemo").read_text() == "weights"
    assert manifest.metrics == {"files": 1, "bytes": 7}
    assert Manifest.read(workplace / "llama_v1.0").config["source"] == source


def test_ngc_tells_where_it_lies_and_what_comes_next(client, workplace):
    done = minitron("download", "ngc://acme/nemo2:2.0", "models/my llama")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == "download: models/my llama\n  files: 1\n  bytes: 2\nnext: minitron inspect 'models/my llama'\n"
    )
    assert (workplace / "models/my llama/weights/metadata.json").is_file()


def test_the_same_download_is_made_once(client, workplace):
    first = fetch("ngc://acme/llama:1.0")
    client.unlink()
    assert fetch("ngc://acme/llama:1.0") == first


def test_another_download_does_not_replace_what_is_there(client, workplace):
    fetch("ngc://acme/llama:1.0", output="model")
    message = failure(OutputExistsError, "ngc://acme/llama:2.0", output="model")
    assert "model exists" in message and "overwrite=true" in message
    (workplace / "mine").mkdir()
    (workplace / "mine/notes.txt").write_text("precious")
    failure(OutputExistsError, "ngc://acme/llama:1.0", output="mine")
    assert all_below(workplace / "mine") == ["notes.txt"]


def test_overwrite_keeps_the_old_one_until_the_new_one_is_whole(client, workplace):
    fetch("ngc://acme/llama:1.0", output="model")
    (workplace / "model/llama.nemo").write_text("old")
    for broken in ("half", "killed", "unknown", "empty"):
        failure(CheckpointError, f"ngc://acme/{broken}:1.0", output="model", overwrite=True)
        assert (workplace / "model/llama.nemo").read_text() == "old"
    fetch("ngc://acme/llama:1.0", output="model", overwrite=True)
    assert (workplace / "model/llama.nemo").read_text() == "weights"
    assert os.listdir(workplace) == ["model"]


@pytest.mark.parametrize(
    "model, expected",
    [
        ("unknown", ["ended with code 1", "Client Error: 404", "Check org, team, model and version"]),
        ("orgless", ["Missing org", "export NGC_CLI_ORG=ORG"]),
        ("terms", ["412", "Accept the model's terms"]),
        ("killed", ["killed by signal 9", "Getting files to download", "Run this again"]),
        ("half", ["ended with code 5", "Download status: In Progress"]),
        ("old", ["Download status: Incomplete"]),
        ("empty", ["left nothing in empty_v1.0", "Download status: Completed"]),
        ("missing", ["left nothing in missing_v1.0"]),
        ("notes", ["holds no checkpoint", "only README.md"]),
    ],
)
def test_what_ngc_does_not_finish_leaves_nothing(client, workplace, model, expected):
    message = failure(CheckpointError, f"ngc://acme/{model}:1.0")
    assert all(part in message for part in expected), message
    assert "\x1b" not in message and "━" not in message
    assert os.listdir(workplace) == []


def test_without_a_key_the_message_says_how_to_set_it(client, workplace):
    done = minitron("download", "ngc://acme/llama:1.0", NGC_CLI_API_KEY="")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Artifact is not Guest accessible!" in done.stderr
    assert "Set the key, export NGC_CLI_API_KEY=KEY (or run `ngc config set`)" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(workplace) == []


def test_without_the_client_the_message_says_how_to_install_it(workplace, monkeypatch):
    monkeypatch.setenv("PATH", str(workplace))
    message = failure(EngineError, "ngc://acme/llama:1.0")
    assert "https://org.ngc.nvidia.com/setup/installers/cli" in message and "NGC_CLI_API_KEY" in message
    assert os.listdir(workplace) == []


def test_a_client_that_does_not_run_is_one_message(client, workplace):
    client.write_bytes(b"\x7fELF of another machine")
    assert "does not run" in failure(EngineError, "ngc://acme/llama:1.0")
    assert os.listdir(workplace) == []


def test_a_kill_halfway_leaves_nothing_that_looks_finished(client, workplace, tmp_path):
    source, pid_file = "ngc://acme/slow:1.0", tmp_path / "pid"
    running = subprocess.Popen(
        [sys.executable, "-m", "nemo_minitron", "download", source], env={**os.environ, "PID_FILE": str(pid_file)}
    )
    try:
        deadline = time.monotonic() + 30
        while not (pid_file.is_file() and pid_file.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.02)
        running.kill()
        running.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert sorted(os.listdir(workplace)) == [".slow_v1.0.lock", ".slow_v1.0.partial"]
    client.write_text(CLIENT.replace("slow)", "never)"))
    fetch(source)
    assert all_below(workplace) == ["slow_v1.0/manifest.json", "slow_v1.0/slow.nemo"]


def test_an_interrupt_stops_the_client(client, workplace, monkeypatch, tmp_path):
    pid_file = tmp_path / "pid"
    monkeypatch.setenv("PID_FILE", str(pid_file))
    running = subprocess.Popen(
        [sys.executable, "-m", "nemo_minitron", "download", "ngc://acme/slow:1.0"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not (pid_file.is_file() and pid_file.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert (running.returncode, said) == (130, "interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert os.listdir(workplace) == []


def test_a_terminal_sees_the_client_as_it_works(client, workplace):
    reading, writing = pty.openpty()
    command = [sys.executable, "-m", "nemo_minitron", "download", "ngc://acme/llama:1.0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing, timeout=60)
    os.close(writing)
    seen = b""
    with contextlib.suppress(OSError), os.fdopen(reading, "rb", buffering=0) as terminal:
        while block := terminal.read(4096):
            seen += block
    assert done.returncode == 0
    assert b"progress of" in seen and b"Download status: Completed" in seen
    assert b"download: llama_v1.0" in done.stdout


def test_a_manifest_that_came_along_is_kept(client, workplace):
    fetch("ngc://acme/own:1.0")
    assert json.loads((workplace / "own_v1.0/source-manifest.json").read_text()) == {"config.json": 1}
    assert Manifest.read(workplace / "own_v1.0").stage == "download"


def test_a_place_that_cannot_be_written_is_one_message(client, workplace):
    (workplace / "file").write_text("")
    assert "name another folder" in failure(MinitronError, "ngc://acme/llama:1.0", output="file/model")


@pytest.mark.parametrize(
    "source",
    [
        "",
        "???",
        "llama",
        "ngc://llama:1.0",
        "ngc://acme/a/b/llama:1.0",
        "ngc://acme/--dest:1.0",
        "ngc://-x/llama:1.0",
        "ngc://acme/../llama:1.0",
        "ngc://acme/lla..ma:1.0",
        "ngc://acme/llama:../1",
        "ngc://acme/llama:--file",
        "ngc://acme/llama:1.0\n",
        "ngc://acme/llama:1.0 --file x",
        "ngc://acme/llama:$(id)",
        "ngc://acmé/llama:1.0",
        "hf://gpt2",
        "hf://a/b/c",
        "hf://../b",
        "hf://a/-b",
        "hf://a/b@",
        "hf://a/b@../c",
        "hf://a/b@x/../c",
        "https://huggingface.co/a/b",
    ],
)
def test_other_sources_are_refused_before_anything_is_run(client, workplace, source):
    assert "source" in failure(ConfigError, source)
    assert os.listdir(workplace) == []


def test_a_version_left_out_is_said_so():
    message = failure(ConfigError, "ngc://acme/team/llama")
    assert "names no version: ngc://acme/team/llama:VERSION" in message


@pytest.mark.parametrize("output", ["", ".", "..", "a/..", "/"])
def test_a_folder_without_a_name_is_refused(output):
    assert "has no name of its own" in failure(ConfigError, "hf://a/b", output=output)


@pytest.mark.parametrize(
    "source, folder",
    [
        ("ngc://acme/llama-3_1:24.07+ba20-x", "llama-3_1_v24.07+ba20-x"),
        ("hf://meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("hf://a/b@refs/pr/1", "b"),
        ("hf://a/b@v1.0", "b"),
    ],
)
def test_the_folder_has_the_models_name(source, folder):
    assert validated(DownloadConfig(source=source)).folder == folder


COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two" * 1000,
    "tokenizer.model": b"pieces",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ x }}",
}
NOT_FETCHED = {
    "pytorch_model.bin": b"pickle",
    "modeling_x.py": b"import os",
    "consolidated.safetensors": b"onetwo",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's two kinds of paths: what a model is, and a file of it."""

    models: dict = {}
    asked: list = []

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        model = self.models.get(name)
        if model is None:
            return self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if api and parts[4] == "tree":
            return self.list(model)
        if api:
            return self.describe(name, model, parts[5])
        return self.give(model, "/".join(parts[4:]))

    def describe(self, name, model, revision):
        if revision not in ("main", COMMIT, "refs%2Fpr%2F1"):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        if "status" in model:
            return self.answer(model["status"], {})
        siblings = [{"rfilename": file, "size": len(data)} for file, data in model["files"].items()]
        return self.answer(200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

    def list(self, model):
        """What huggingface_hub 1 asks for before it fetches a snapshot."""
        files = [
            {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for file, data in model["files"].items()
        ]
        return self.answer(200, {}, json.dumps(files).encode())

    def give(self, model, file):
        if model.get("gated") and self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        data = model["files"][file]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        broken = self.command == "GET" and file == model.get("broken")
        return self.answer(410 if broken else 200, {} if broken else headers, data)

    def answer(self, status, headers, data=b""):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(workplace, tmp_path, monkeypatch):
    """The stand-in for the hub; HF_ENDPOINT names it."""
    handler = type("ThisHub", (Hub,), {"models": {"acme/llama": {"files": {**FILES, **NOT_FETCHED}}}, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield handler
        server.shutdown()


def refused(*arguments, **environment):
    """The one message of a download that fails."""
    done = minitron("download", *arguments, **environment)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith(f"{arguments[0].partition('@')[0]}: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_hub_fetches_weights_configuration_and_tokenizer_only(hub, workplace):
    done = minitron("download", "hf://acme/llama")
    assert (done.returncode, done.stderr) == (0, "")
    sizes = sum(map(len, FILES.values()))
    assert done.stdout == f"download: llama\n  files: 6\n  bytes: {sizes}\nnext: minitron inspect llama\n"
    assert all_below(workplace) == sorted(f"llama/{name}" for name in [*FILES, "manifest.json"])
    assert {name: (workplace / "llama" / name).read_bytes() for name in FILES} == FILES
    assert Manifest.read(workplace / "llama").details == {"commit": COMMIT}
    hub.models.clear()
    assert minitron("download", "hf://acme/llama", HF_ENDPOINT="http://127.0.0.1:1").stdout == done.stdout


def test_hub_takes_a_revision(hub, workplace):
    assert minitron("download", "hf://acme/llama@refs/pr/1", "pr").returncode == 0
    assert "there is no revision v9" in refused("hf://acme/llama@v9")
    assert os.listdir(workplace) == ["pr"]


def test_a_gated_model_says_licence_and_token(hub, workplace):
    hub.models["acme/llama"]["gated"] = True
    message = refused("hf://acme/llama")
    assert f"accept its licence at {os.environ['HF_ENDPOINT']}/acme/llama" in message and "HF_TOKEN" in message
    assert not (workplace / "llama").exists()
    assert minitron("download", "hf://acme/llama", HF_TOKEN="hf_good").returncode == 0


def test_a_model_that_is_not_there_and_a_token_that_is_not_taken(hub, workplace):
    assert "there is no model acme/lama, or it is private: spell it" in refused("hf://acme/lama")
    hub.models["acme/llama"]["status"] = 403
    assert "the hub refuses access (403)" in refused("hf://acme/llama")
    hub.models["acme/llama"]["status"] = 503
    assert "the hub answered 503: try again later" in refused("hf://acme/llama")
    assert os.listdir(workplace) == []


def test_a_model_without_safetensors_is_refused_before_it_is_fetched(hub, workplace):
    hub.models["acme/pickled"] = {"files": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}}
    message = refused("hf://acme/pickled")
    assert "config.json, pytorch_model.bin" in message and "Pickled weights" in message
    assert not any("resolve" in path for path in hub.asked)
    assert os.listdir(workplace) == []


def test_no_network_and_offline_mode(workplace):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        message = refused("hf://acme/llama", HF_ENDPOINT=endpoint, NO_PROXY="127.0.0.1")
    assert f"{endpoint} is out of reach (Connect" in message and "HF_ENDPOINT=URL" in message
    assert "offline mode is on: unset HF_HUB_OFFLINE" in refused("hf://acme/llama", HF_HUB_OFFLINE="1")
    assert os.listdir(workplace) == []


def test_hub_goes_on_where_it_stopped(hub, workplace):
    hub.models["acme/llama"]["broken"] = "model-00002-of-00002.safetensors"
    assert "the hub answered 410: try again later; what arrived is kept in .llama.partial" in refused("hf://acme/llama")
    assert os.listdir(workplace) == [".llama.partial"]
    assert (workplace / ".llama.partial/model-00001-of-00002.safetensors").read_bytes() == b"one"
    del hub.models["acme/llama"]["broken"]
    hub.asked.clear()
    assert minitron("download", "hf://acme/llama").returncode == 0
    assert [path for path in hub.asked if "00001-of" in path] == []
    assert {name: (workplace / "llama" / name).read_bytes() for name in FILES} == FILES
    assert os.listdir(workplace) == ["llama"]


def test_hub_does_not_mix_commits(hub, workplace):
    hub.models["acme/llama"]["broken"] = "model-00002-of-00002.safetensors"
    refused("hf://acme/llama")
    stamp = workplace / ".llama.partial/.cache/commit"
    assert stamp.read_text() == COMMIT
    stamp.write_text("f" * 40)
    (workplace / ".llama.partial/old.safetensors").write_bytes(b"old")
    del hub.models["acme/llama"]["broken"]
    assert minitron("download", "hf://acme/llama").returncode == 0
    assert all_below(workplace) == sorted(f"llama/{name}" for name in [*FILES, "manifest.json"])


def test_a_connection_lost_after_the_listing_is_not_taken_for_success(workplace, monkeypatch):
    """snapshot_download returns a folder that is not empty where it cannot reach the hub."""
    import huggingface_hub

    from nemo_minitron.conversion.sources import hub as module

    sizes = {name: len(data) for name, data in FILES.items()}
    monkeypatch.setattr(module, "_listing", lambda repo, revision: module.Listing(COMMIT, sizes))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: options["local_dir"])
    assert "config.json did not arrive whole" in failure(CheckpointError, "hf://acme/llama")
    assert os.listdir(workplace) == [".llama.partial"]


def test_a_file_of_the_wrong_size_is_fetched_again(workplace, monkeypatch):
    import huggingface_hub

    from nemo_minitron.conversion.sources import hub as module

    def snapshot_download(*arguments, local_dir, **options):
        if not (local_dir / "config.json").exists():
            (local_dir / "config.json").write_bytes(answers.pop(0))

    answers = [b"short", b"long enough"]
    monkeypatch.setattr(module, "_listing", lambda repo, revision: module.Listing(COMMIT, {"config.json": 11}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "config.json did not arrive whole" in failure(CheckpointError, "hf://acme/llama")
    assert fetch("hf://acme/llama").metrics == {"files": 1, "bytes": 11}


def test_a_disk_that_is_too_small_is_said_before_the_download(workplace, monkeypatch):
    from nemo_minitron.conversion.sources import hub as module

    listing = module.Listing(COMMIT, {"config.json": 2, "model.safetensors": 10**18})
    monkeypatch.setattr(module, "_listing", lambda repo, revision: listing)
    message = failure(MinitronError, "hf://acme/llama")
    assert "needs 1000000000.0 GB more" in message and "output=DIR" in message
    assert not Path("llama").exists()
