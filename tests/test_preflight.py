"""tools/preflight: machines that cannot run together learn why, in a sentence and in seconds."""

import copy
import importlib.metadata
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from machines import Forked, Real, machines_or_skip

from tools.preflight import command, facts, report
from tools.preflight.meeting import Machine, MeetingError, find_missing, meet
from tools.preflight.processes import nccl_networks

CONFIG = ROOT / "configs" / "multi_node" / "ddp_2x8.yaml"


@pytest.fixture(scope="module")
def own_facts():
    return facts.gather_facts(2, 2)


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meet_all(machines, all_facts, output="", wait=4):
    """Let machines meet in threads of this process; return what each got, or its error as text."""
    results = [None] * len(machines)

    def run(number):
        try:
            results[number] = meet(machines[number], all_facts[number], output, wait)
        except MeetingError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=run, args=[number]) for number in range(len(machines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def machine(rank, port, machines=2, address="127.0.0.1"):
    return Machine(rank, machines, machines, address, port)


def changed(own_facts, host, **same):
    other = copy.deepcopy(own_facts)
    other["host"] = host
    other["same"] |= same
    return other


# The meeting --------------------------------------------------------------------------------------
def test_three_machines_meet_and_one_differs(own_facts, port, tmp_path, capsys):
    alike = changed(own_facts, "b", **dict(zip(facts.LAUNCHED, (3, 3))))
    every = [alike | {"host": "a"}, alike, changed(alike, "c", torch="2.0.0", NCCL_IB_DISABLE="1")]
    machines = [machine(rank, port, 3) for rank in range(3)]
    (reports, is_same), *others = meet_all(machines, every, str(tmp_path / "new" / "folder"))
    assert [one.facts["host"] for one in reports] == ["a", "b", "c"]
    assert not is_same and others == [([], False)] * 2
    assert list(tmp_path.iterdir()) == []  # the marks are gone
    assert all(abs(one.clock) < 1 for one in reports)
    report.print_report(reports)
    printed = capsys.readouterr().out
    torch = own_facts["same"]["torch"]
    both = "machine 0 (a) and machine 1 (b)"
    assert f"differs: torch: {torch} on {both}, 2.0.0 on machine 2 (c)\n" in printed
    assert f"differs: NCCL_IB_DISABLE: not set on {both}, 1 on machine 2 (c)\n" in printed
    assert printed.count("differs:") == 2
    assert "note: output folder: the same folder on all machines" in printed


def test_machines_that_are_the_same(own_facts, port, capsys):
    machines = [machine(rank, port) for rank in range(2)]
    (reports, is_same), other = meet_all(machines, [own_facts, changed(own_facts, "b")])
    assert is_same and other == ([], True)
    report.print_report(reports)
    assert "differs" not in (printed := capsys.readouterr().out)
    assert f"same on all machines: {len(own_facts['same'])} facts" in printed


def test_two_machines_with_the_same_rank(own_facts, port):
    machines = [machine(rank, port, 3) for rank in (0, 1, 1)]
    alike = changed(own_facts, "b", **dict(zip(facts.LAUNCHED, (3, 3))))
    results = meet_all(machines, [alike, alike, alike | {"host": "c"}])
    for result in results:
        assert re.match(r"two machines have --machine_rank 1: [bc] \(127.0.0.1\) and [bc] ", result)


def test_two_machines_of_one_host_with_rank_0(own_facts, port):
    results = meet_all([machine(0, port)] * 2, [own_facts] * 2)
    assert all(one.startswith("two machines have --machine_rank 0: ") for one in results), results


def test_another_number_of_processes(own_facts, port):
    every = [own_facts, changed(own_facts, "b", **{"--num_processes": 16})]
    results = meet_all([machine(rank, port) for rank in range(2)], every)
    told = f"--num_processes is 2 on machine 0 ({own_facts['host']}) and 16 on machine 1 (b): give"
    assert all(result.startswith(told) for result in results)


@pytest.mark.parametrize(
    "address, told",
    [
        ("127.0.0.1", r"no machine with --machine_rank 0 answers at 127\.0\.0\.1:\d+: this mach"),
        ("no.such.host.invalid", r"the name no\.such\.host\.invalid of --main_process_ip is unk"),
    ],
)
def test_wrong_address(own_facts, port, address, told):
    with pytest.raises(MeetingError, match=told):
        meet(machine(1, port, address=address), own_facts, "", 1)


def test_a_machine_that_does_not_come(own_facts, port):
    told = r"machine 1 did not come to 127\.0\.0\.1:\d+ within 1 s: start the preflight there"
    with pytest.raises(MeetingError, match=told):
        meet(machine(0, port), own_facts, "", 1)
    first = facts.Report(0, "", own_facts, 0.0, {})
    told = find_missing([first], machine(0, port, 3, "192.0.2.77"), 1)
    assert told.startswith("machines 1, 2 did not come to 192.0.2.77:")
    assert "--main_process_ip is no address of this machine, which has " in told


def test_a_used_port(own_facts):
    def answer():
        for _ in range(2):
            server.accept()[0].sendall(b"SSH-2.0\n")

    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MeetingError, match=f"port {port} of this machine is used by another"):
            meet(machine(0, port), own_facts, "", 1)
        with pytest.raises(MeetingError, match="is no preflight, or one that has ended"):
            meet(machine(1, port), own_facts, "", 1)
        thread.join()


@pytest.mark.slow
def test_strangers_do_not_disturb(own_facts, port):
    def knock():
        for _ in range(50):
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as stranger:
                    return stranger.sendall(b"GET / HTTP/1.1\n[]\n")
            except OSError:
                time.sleep(0.05)

    thread = threading.Thread(target=knock)
    thread.start()
    results = meet_all([machine(rank, port) for rank in range(2)], [own_facts] * 2, wait=8)
    thread.join()
    assert results[1] == ([], True)


# Facts --------------------------------------------------------------------------------------------
def test_facts_name_every_requirement(own_facts):
    text = (ROOT / "requirements.txt").read_text()
    names = [line.partition("==")[0] for line in text.splitlines() if "==" in line]
    assert len(names) > 8 and set(names) < set(own_facts["same"])
    assert {"Python", "files of this repository", "GPUs", *facts.LAUNCHED} < set(own_facts["same"])


def test_hash_of_the_repository(tmp_path, monkeypatch):
    for part in facts.PARTS:
        (tmp_path / part).mkdir()
    (tmp_path / "utils/one.py").write_text("a")
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    before = facts.hash_of_repository()
    (tmp_path / "utils/__pycache__").mkdir()
    (tmp_path / "utils/__pycache__/one.pyc").write_text("b")
    assert facts.hash_of_repository() == before
    (tmp_path / "utils/one.py").rename(tmp_path / "utils/two.py")
    assert facts.hash_of_repository() != before


def test_notes(own_facts):
    far = changed(own_facts, "b")
    far["memory"] = [own_facts["memory"][0] // 3, own_facts["memory"][1]]
    far["number of GPUs"] = 8
    shared = dict.fromkeys(("output folder", "Hugging Face cache"), True)
    reports = [
        facts.Report(0, "10.0.0.1", own_facts, 0.0, shared),
        facts.Report(1, "10.0.0.2", far, -7.25, {**shared, "output folder": False}),
        facts.Report(2, "10.0.0.3", far, 0.1, {**shared, "output folder": "/x is not writable"}),
    ]
    told = "\n".join(report.notes(reports))
    assert "the clock of machine 1 (b) is off by -7.2 s" in told
    assert "machine 1 (b) has less than half of the free memory of another" in told
    assert "machine 1 (b) has 8 GPUs and runs 1 processes: --num_processes counts" in told
    assert "output folder of machine 2 (b): /x is not writable" in told
    first = reports[0].name()
    assert f"output folder: not the same folder on {first} and on machine 1 (b): checkpoi" in told
    assert "Hugging Face cache: the same folder on all machines" in told


def test_networks_in_the_log_of_nccl():
    bootstrap, network = "Bootstrap : Using eth0:10.0.0.1<0>", "NET/IB : Using [0]mlx5_0:1/IB [RO]"
    lines = [f"a:9:9 [0] NCCL INFO {one}" for one in (bootstrap, "cudaDriver 12040", network)]
    assert nccl_networks("\n".join([*lines, lines[-1], ""])) == [bootstrap, network]


def test_words_of_the_launcher(capfd):
    words = ["--config_file", str(CONFIG), "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    args, own = command.read_words([*words, "examples/chat_sft.py", "--output_dir", "x"])
    assert own == Machine(1, 2, 16, "10.0.0.1", 29500)
    assert command.output_dir(args.training_script_args) == "x"
    assert command.output_dir(["--seed", "1", "--output_dir=y"]) == "y"
    assert command.output_dir(["--seed", "1"]) == ""
    assert command.read_words(words)[1] == own


def stop(message):
    raise MeetingError(message)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--num_machines", "1"], "--num_machines is 1: the preflight compares several machines"),
        (["--num_processes", "0"], "--num_processes is 0, the number on all machines together"),
        (["--num_processes", "15"], "--num_processes is 15, the number on all machines together"),
        (["--machine_rank", "2"], "--machine_rank is 2: give 0 to 1"),
        (["--rdzv_backend", "c10d"], "--rdzv_backend c10d does not give the machines ranks"),
    ],
)
def test_words_that_cannot_run(words, told, monkeypatch):
    monkeypatch.setattr(command, "end", stop)
    given = ["--config_file", str(CONFIG), "--main_process_ip", "10.0.0.1", *words]
    with pytest.raises(MeetingError, match=told):
        command.read_words(given)


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "tools.preflight", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "accelerate launch" in done.stdout


# All of it, on two machines -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def machines():
    yield from machines_or_skip()


@pytest.fixture
def check(machines, forks, tmp_path):
    """A function that runs the preflight on both machines, with the words that each is given."""

    def check(*words, limit=300, **variables):
        for one in machines:
            one.connect("up")
        given = ["--config_file", CONFIG, "--num_processes", 2]
        commands = []
        for own in words:
            commands.append(("-m", "tools.preflight", *given, *own))
        run = Forked(forks, tmp_path, machines, commands, **variables)
        codes = run.wait(limit)
        for text in run.texts():
            assert "Traceback" not in text, text
        return codes, *run.texts()

    return check


def words_of(rank, address="10.77.0.1"):
    return ("--machine_rank", rank, "--main_process_ip", address)


@pytest.mark.slow
def test_two_machines(check):
    codes, first, second = check(words_of(0), words_of(1))
    assert codes == [0, 0], first + second
    assert re.search(r"machine 1 \(host1\): 1 x CPU; gloo connected from t\d+-1 \(10\.77", first)
    assert re.search(r"all-reduce of \d+ MiB over 2 processes: \S+ s, bus bandwidth", first)
    assert "differs" not in first and "error" not in first + second


@pytest.mark.slow
def test_machines_of_different_versions(machines, environment, tmp_path):
    """The second machine has a copy of the repository with another file, and another peft."""
    copied, packages = tmp_path / "repository", tmp_path / "packages"
    for part in facts.PARTS:
        shutil.copytree(ROOT / part, copied / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", copied)
    with (copied / "utils" / "data.py").open("a") as file:
        file.write("# changed\n")
    (packages / "peft-0.0.1.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n"
    (packages / "peft-0.0.1.dist-info" / "METADATA").write_text(metadata)
    preflight = (sys.executable, "-m", "tools.preflight", "--config_file", CONFIG)
    commands = [(*preflight, "--num_processes", 2, *words_of(rank)) for rank in (0, 1)]
    commands[1] = ("env", "-C", copied, f"PYTHONPATH={packages}", *commands[1])
    for one in machines:
        one.connect("up")
    run = Real(environment, tmp_path, machines, commands, ROOT)
    assert run.wait(300) == [1, 1], run.told()
    first, second = run.texts()
    here, there = r"on machine 0 \(host0\)", r"on machine 1 \(host1\)"
    files, version = facts.hash_of_repository(), importlib.metadata.version("peft")
    told = re.findall("^differs: .*", first, re.MULTILINE)
    assert len(told) == 2, first
    assert re.fullmatch(rf"differs: peft: {re.escape(version)} {here}, 0\.0\.1 {there}", told[0])
    wanted = rf"differs: files of this repository: {files} {here}, (?!{files})\w+ {there}"
    assert re.fullmatch(wanted, told[1])
    for text in (first, second):
        assert text.count("error: ") == text.count("error: the machines differ: see the lines") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "ports, told",
    [
        (
            [29500],
            ["machine 1 did not come to 10.77.0.1:29500 within 6 s", "does not answer (timed"],
        ),
        (["1-29499", "29501-65534"], ["do not reach those of other machines"] * 2),
    ],
)
def test_ports_that_a_firewall_closes(check, machines, ports, told):
    """The limit is less than the 2 minutes for which Linux alone would try to connect."""
    with machines[0].closed(*ports):
        codes, *texts = check(words_of(0), words_of(1), limit=100, PREFLIGHT_SECONDS="6")
    assert codes == [1, 1]
    for text, sentence in zip(texts, told, strict=True):
        assert text.count(sentence) == 1, text


@pytest.mark.slow
@pytest.mark.parametrize(
    "rank, told",
    [
        (0, ["two machines have --machine_rank 0: host0 (10.77.0.1) and host1 (10.77.0.2)"] * 2),
        (
            1,
            [
                "no machine with --machine_rank 0 answers at 10.77.0.1:29500: this machine has "
                "that address, and --machine_rank 1.",
                "with --machine_rank 0: perhaps two machines have --machine_rank 1.",
            ],
        ),
    ],
)
def test_two_machines_with_one_rank(check, rank, told):
    codes, *texts = check(words_of(rank), words_of(rank), PREFLIGHT_SECONDS="6")
    assert codes == [1, 1]
    for text, sentence in zip(texts, told, strict=True):
        assert text.count("error: ") == text.count(sentence) == 1, text


@pytest.mark.slow
@pytest.mark.parametrize(
    "address, told", [("10.77.0.99", "10.77.0.99:29500 does not answer"), ("node9", "the name no")]
)
def test_a_wrong_address_on_one_machine(check, address, told):
    codes, first, second = check(words_of(0), words_of(1, address), PREFLIGHT_SECONDS="6")
    assert codes == [1, 1] and f"error: {told}" in second
    assert "error: machine 1 did not come to 10.77.0.1:29500 within 6 s" in first


@pytest.mark.slow
def test_an_interface_that_others_do_not_reach(check):
    variables = {"GLOO_SOCKET_IFNAME": "lo"}
    codes, *texts = check(words_of(0), words_of(1), **variables)
    assert codes == [1, 1]
    assert any(
        re.search("error: the processes of host. do not reach those of other machines", text)
        for text in texts
    ), texts
