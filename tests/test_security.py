"""Input from outside is data: nothing in it is run or leads out of its folder, and no secret in it is recorded."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from pretrain.checkpoints.folders import resolve
from pretrain.config.schema import load_config
from pretrain.data.remote.cache import CacheSettings
from pretrain.data.remote.storage import Storage
from pretrain.data.text.sources import open_source
from pretrain.data.tokenizer import load_tokenizer, load_tokenizer_info
from pretrain.data.tokens import open_shards
from pretrain.errors import UserError
from pretrain.export.convert import convert
from pretrain.export.proof import model_class_of
from pretrain.files import checksum
from pretrain.model.evenkeel_llama import MODELING_FILE, bring_modeling_file
from tests.support.corpus import Corpus, tiny
from tests.support.faulty_server import FaultyServer
from tests.support.runs import REPOSITORY, arguments, assert_refused, run_ranks, start_ranks, status

SECRETS = {
    "WANDB_API_KEY": "f00dfeedf00dfeedf00dfeedf00dfeedf00dfeed",
    "HF_TOKEN": "hf_f00dfeedSecretOfTheHub",
    "AWS_SECRET_ACCESS_KEY": "f00dfeedSecretOfTheStore",
}
PARTS = ("pretrain", "tools")
# The one place that pickles: it copies objects of this process within its memory, and reads no file.
PICKLES_IN_MEMORY = "pretrain/checkpoints/staging.py"
HOSTILE_NAME = "a $(touch PWNED) `touch PWNED`; touch PWNED & 'b' \"c\" | *"


# ---- code that is never written here


def test_no_code_is_run_that_is_not_written_here() -> None:
    files = {
        path.relative_to(REPOSITORY).as_posix(): path for part in PARTS for path in (REPOSITORY / part).rglob("*.py")
    }
    assert len(files) > 100
    found = [(name, line, fault) for name, path in files.items() for line, fault in dangers(path.read_text())]
    assert [place for place in found if place[::2] != (PICKLES_IN_MEMORY, "pickles")] == []


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run(f'ls {name}')",
        "subprocess.run('ls ' + name)",
        "subprocess.Popen(words, shell=True)",
        "subprocess.run(['bash', '-c', f'ls {name}'])",
        "subprocess.getoutput('ls')",
        "os.system(line)",
        "os.popen(line)",
        "eval(text)",
        "exec(text)",
        "import pickle",
        "from joblib import load",
        "from pickle import UnpicklingError, loads",
        "np.load(path, allow_pickle=True)",
        "np.load(path, None, flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.hub.load(name)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "pipeline('text-generation', model=path)",
    ],
)
def test_such_code_would_be_found(line: str) -> None:
    assert list(dangers(line))


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run(['git', '-C', here])",
        "subprocess.run(command, shell=False)",
        "model.eval()",
        "from pickle import UnpicklingError",
        "np.load(path, mmap_mode='r')",
        "torch.load(path, weights_only=True)",
        "yaml.load(text, yaml.SafeLoader)",
        "class Own(yaml.SafeLoader): ...\nyaml.load(text, Own)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=False)",
    ],
)
def test_other_code_is_let_be(line: str) -> None:
    assert not list(dangers(line))


def test_no_batch_script_evaluates_a_string() -> None:
    scripts = [path for path in (REPOSITORY / "slurm").iterdir() if path.suffix in (".sh", ".sbatch", ".env")]
    assert scripts
    for path in scripts:
        lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert not [line for line in lines if re.search(r"(^|[\s;&|(])(eval|(ba)?sh\s+-\w*c)\s", line)], path


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and kind of everything in Python code that could run input from outside."""
    tree = ast.parse(source)
    safe_loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) in safe_loaders for base in node.bases):
            safe_loaders.add(node.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and {name.name for name in node.names} != {"UnpicklingError"}:
            imported = {(node.module or "").partition(".")[0]}
        else:
            imported = set()
        if imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}:
            yield node.lineno, "pickles"
        if isinstance(node, ast.Call) and (fault := _danger_of_call(node, safe_loaders)):
            yield node.lineno, fault


def _danger_of_call(call: ast.Call, safe_loaders: set[str]) -> str | None:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    first = call.args[0] if call.args else None
    if name in (
        "eval",
        "exec",
        "__import__",
        "os.system",
        "os.popen",
        "torch.hub.load",
        "torch.package.PackageImporter",
    ):
        return "runs a string"
    if name.startswith("subprocess."):
        words = [ast.unparse(word).strip("'") for word in getattr(first, "elts", [])]
        in_a_shell = given.get("shell", "False") != "False" or name.endswith(("getoutput", "getstatusoutput"))
        through_one = words[:1] in (["sh"], ["bash"]) and any(word.startswith("-") and "c" in word for word in words)
        if in_a_shell or through_one or isinstance(first, ast.Constant | ast.JoinedStr | ast.BinOp):
            return "runs a shell"
    if name in ("np.load", "numpy.load") and (given.get("allow_pickle", "False") != "False" or len(call.args) > 2):
        return "unpickles"
    if name == "torch.load" and given.get("weights_only") != "True":
        return "unpickles"
    if name.startswith("yaml.") and name.endswith("load"):
        loader = ast.unparse(call.args[1]) if len(call.args) > 1 else given.get("Loader")
        if name != "yaml.safe_load" and loader not in safe_loaders:
            return "makes any object of YAML"
    by_name = re.fullmatch(r"Auto\w+\.from_pretrained|(transformers\.)?pipeline", name)
    if by_name and given.get("trust_remote_code") != "False":
        return "may run a model's own code"
    return None


# ---- manifests of data


@pytest.fixture
def shards(corpus: Corpus, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus.train, tmp_path / "shards"))


def change_first_shard(folder: Path, **values: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0].update(values)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../other.bin", "/etc/passwd", "..", "a/b.bin", "a\\b.bin", "", "a\0b"])
@pytest.mark.parametrize("field", ["file", "ends_file"])
def test_names_of_shards_stay_in_their_folder(shards: Path, field: str, name: str) -> None:
    change_first_shard(shards, **{field: name})
    with pytest.raises(UserError, match="leads out of the folder"):
        open_shards(shards)


def test_links_out_of_a_corpus_are_refused_and_links_to_it_are_not(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(shards)
    assert open_shards(tmp_path / "link").tokens == open_shards(shards).tokens
    first = json.loads((shards / "manifest.json").read_text())["shards"][0]["file"]
    (shards / first).rename(shards / "renamed.bin")
    (shards / first).symlink_to("renamed.bin")
    open_shards(shards)
    (shards / "renamed.bin").rename(tmp_path / "outside.bin")
    (shards / first).unlink()
    (shards / first).symlink_to("../outside.bin")
    with pytest.raises(UserError, match=f"{first} is a link that leads out of the folder"):
        open_shards(shards, verify="size")
    with pytest.raises(UserError, match="leads out of the folder"):
        open_shards(tmp_path / "link")


@pytest.mark.parametrize("field", ["xxh3_128", "ends_xxh3_128"])
def test_a_checksum_that_is_a_path_deletes_nothing_of_ours(shards: Path, tmp_path: Path, field: str) -> None:
    """Files of a remote corpus are kept under their checksums."""
    victim, cache = tmp_path / "victim", tmp_path / "cache/of/shards"
    victim.write_text("precious")
    for path in (str(victim), "../../../victim"):
        change_first_shard(shards, **{field: path})
        objects = {f"/corpus/{file.name}": file.read_bytes() for file in shards.iterdir()}
        with FaultyServer(objects) as server, pytest.raises(UserError, match="has the checksum"):
            read_first_shard(f"{server.url}/corpus", cache)
        assert victim.read_text() == "precious"


def read_first_shard(location: str, cache: Path) -> None:
    shards = open_shards(location, cache=CacheSettings(cache, 10**9))
    shards.open_tokens(0)
    shards.open_ends(0)


# ---- code in folders of tokenizers, models and checkpoints


def plant(path: Path, ran: Path) -> None:
    """Write Python code that leaves a sign when it is run."""
    path.write_text(f"open({str(ran)!r}, 'w')\n", encoding="utf-8")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_code_in_a_tokenizer_folder_is_not_run(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not run even if a person, or `yes |`, would agree to it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, ran = Path(shutil.copytree(corpus.tokenizer, tmp_path / "tokenizer")), tmp_path / "ran"
    plant(folder / "hostile.py", ran)
    change(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["hostile.T", "hostile.T"]}, tokenizer_class="T"
    )
    for load in (load_tokenizer, load_tokenizer_info):
        with pytest.raises(UserError, match="custom code"):
            load(folder)
    assert not ran.exists()


def test_a_configuration_cannot_name_the_class_that_a_conversion_loads(tmp_path: Path) -> None:
    exported, elsewhere, ran = tmp_path / "exported", tmp_path / "elsewhere", tmp_path / "ran"
    elsewhere.mkdir()
    plant(elsewhere / "hostile.py", ran)
    config = LlamaConfig(auto_map={"AutoModelForCausalLM": f"{elsewhere}--hostile.Model"})
    config.save_pretrained(exported)
    assert model_class_of(exported) is AutoModelForCausalLM
    bring_modeling_file(config, exported)
    config.save_pretrained(exported)
    assert "auto_map" not in json.loads((exported / "config.json").read_text())
    assert not ran.exists()


def test_a_forged_checkpoint_is_converted_by_our_own_code(runs: Runs, tmp_path: Path) -> None:
    """Its manifest is right: an attacker who can write the files can write their checksums."""
    checkpoint, ran = tmp_path / "checkpoint", tmp_path / "ran"
    shutil.copytree(resolve(runs.folder / "checkpoints/latest"), checkpoint)
    plant(tmp_path / "hostile.py", ran)
    plant(checkpoint / "hf" / MODELING_FILE.name, ran)
    change(checkpoint / "hf/config.json", auto_map={"AutoModelForCausalLM": f"{tmp_path}--hostile.Model"})
    sign(checkpoint)
    convert(checkpoint, tmp_path / "hf")
    assert not ran.exists()
    assert (tmp_path / "hf" / MODELING_FILE.name).read_bytes() == MODELING_FILE.read_bytes()
    named = json.loads((tmp_path / "hf/config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    assert named == f"{MODELING_FILE.stem}.EvenkeelLlamaForCausalLM"


def sign(checkpoint: Path) -> None:
    """Rewrite the manifest for all files that are there."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
        for path in files
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


# ---- secrets, and names that a shell would take for commands


class Runs:
    """Two runs with secrets in their environment, tracking, and a name that no shell may see. One run fails."""

    def __init__(self, corpus: Corpus, folder: Path) -> None:
        self.out = folder / HOSTILE_NAME
        content = {**tiny(corpus), "methods": [{"name": "seednorm"}], "out": str(self.out), "steps": 2}
        content |= {"log": {"interval_steps": 1, "wandb": {"mode": "offline"}}}
        run_file = folder / "run.yaml"
        run_file.write_text(yaml.safe_dump(content))
        with ExitStack() as stack:
            jobs = [
                stack.enter_context(
                    start_ranks(arguments(run_file, {"name": name}), folder / "logs" / name, 1, prepare=prepare)
                )
                for name, prepare in (("whole", hold_secrets), ("broken", hold_secrets_and_fail))
            ]
            self.whole, self.broken = (job.wait() for job in jobs)
        self.folder = self.out / "whole"


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until `condition` is true: wandb's process continues after a run has failed."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def hold_secrets() -> None:
    os.environ.update(SECRETS)


def hold_secrets_and_fail() -> None:
    from pretrain.trainer import trainer

    def fail(*_: object) -> float:
        raise ValueError("broken on purpose")

    hold_secrets()
    trainer.learning_rate = fail


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(corpus, tmp_path_factory.mktemp("runs"))


def test_secrets_of_the_environment_are_in_no_file_and_no_output(runs: Runs) -> None:
    assert runs.whole.code == 0, runs.whole.stderr
    assert runs.broken.code == 1
    assert "broken on purpose" in status(runs.out / "broken")["reason"]
    for ended, name in ((runs.whole, "whole"), (runs.broken, "broken")):
        wait_for(lambda name=name: list((runs.out / name / "wandb").glob("offline-run-*/*.wandb")))
        files = [path for path in (runs.out / name).rglob("*") if path.is_file()]
        assert len(files) > 8
        for secret in SECRETS.values():
            assert secret not in ended.stdout + ended.stderr
            assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_names_are_no_commands(runs: Runs) -> None:
    assert status(runs.folder)["status"] == "finished"
    assert (runs.folder / "checkpoints/latest").exists()
    for folder in (Path.cwd(), REPOSITORY, runs.out, runs.folder):
        assert not (folder / "PWNED").exists()


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-x", "a/b", "$(touch PWNED)", "a;b", "a b", "a\n", ""])
def test_a_run_is_named_like_a_folder_of_its_own(run_file: Path, name: str) -> None:
    with pytest.raises(UserError, match="name: "):
        load_config(run_file, [f"name={json.dumps(name)}"])


HIDDEN = "hunter2"
LOCATIONS = (
    f"https://me:{HIDDEN}@127.0.0.1:1/corpus",
    f"s3://key:{HIDDEN}@bucket/corpus",
    f"https://{HIDDEN}@127.0.0.1:1/x",
)


def test_urls_with_credentials_are_refused_without_repeating_them(run_file: Path, tmp_path: Path) -> None:
    settings = {"out": str(tmp_path / "runs"), "data.train": LOCATIONS[0]}
    ended = run_ranks(arguments(run_file, settings), tmp_path / "logs", ranks=1)
    assert_refused(ended, "data.train", "https://***@127.0.0.1:1/corpus", "environment")
    assert HIDDEN not in ended.stdout + ended.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize(
    "use",
    [
        lambda run_file, url: load_config(run_file, [f"data.train={url}"]),
        lambda run_file, url: load_config(run_file, [f"data.train=[{{path: '{url}'}}]"]),
        lambda run_file, url: load_config(run_file, [f"data.val={url}"]),
        lambda run_file, url: load_config(run_file, [f"data.trian={url}"]),
        lambda run_file, url: Storage(url),
        lambda run_file, url: open_source([f"{url}/a.jsonl"], text_field="text", subset=None, split="train"),
    ],
    ids=["train", "mixture", "val", "misspelt", "shards", "text"],
)
def test_no_message_repeats_a_credential(run_file: Path, use: Callable, location: str) -> None:
    with pytest.raises(UserError, match=r"\*\*\*@") as caught:
        use(run_file, location)
    assert HIDDEN not in str(caught.value)


@pytest.mark.parametrize("key", ["log.wandb.api_key", "password", "data.hf_token", "AWS_SECRET_ACCESS_KEY"])
def test_a_credential_among_the_settings_is_refused_and_masked(run_file: Path, key: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--set {key}=***")) as caught:
        load_config(run_file, [f"{key}={HIDDEN}"])
    assert HIDDEN not in str(caught.value)


def test_ordinary_settings_are_shown_as_they_are(run_file: Path) -> None:
    settings = ["tokenizer=3", "tokens=x", "seed=1.5", "data.val=[hf://owner/data@main]"]
    for setting in settings:
        with pytest.raises(UserError, match=re.escape(f"--set {setting}: ")):
            load_config(run_file, [setting])
