"""Training on two hosts, one of which loses its worker, or the network between them, in the middle of the run.

    sudo python tests/two_hosts.py             undisturbed, a worker killed, the link cut for 60 seconds
    sudo python tests/two_hosts.py --cut 5     another time

Linux only, with root and the program `ip`. The hosts are two network namespaces joined by a pair of virtual network
cards. Each runs torchrun as docs/running.md describes it for several machines. Both see the same files. The final
weights of a disturbed run must be those of the undisturbed run, bit for bit; otherwise the exit code is 1. The sums of
two processes do not depend on their order, so nothing less is right.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from helpers import ROOT

from vmrnn.checkpoint import read_checkpoint
from vmrnn.run_folder import read_log

HOSTS = ("vmrnn-a", "vmrnn-b")
ADDRESSES = ("10.99.0.1", "10.99.0.2")
CARD = "wire"  # the name of both network cards
PORT = 29500
RESTARTS = 3
READ_TIMEOUT = 600  # seconds that torchrun waits for the other host; by default 60
UPDATES = 60  # of the whole run
DISTURBED_AT = 10  # updates in the log when the run is disturbed

# A run of seconds: one cell of width 16 on digits of 16 x 16 pixels. Saved every 5 updates.
TRAIN = [
    "train.py", "--model", "VMRNN-B", "--patch_size", "4", "--embed_dim", "16", "--depths", "1", "--d_state", "4",
    "--train_data_dir", "builtin", "--input_size", "16", "--digit_size", "8", "--num_objects", "1",
    "--num_frames_input", "3", "--num_frames_output", "2", "--train_sequences", "80", "--valid_sequences", "4",
    "--train_batch_size", "4", "--epochs", "3", "--epoch_valid", "3", "--log_train", "1", "--save_every", "5",
    "--device", "cpu", "--num_workers", "0", "--resume", "auto",
]  # fmt: skip


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def join_hosts():
    """Make the two namespaces and the link between them."""
    for host in HOSTS:
        ip("netns", "add", host)
        ip("-n", host, "link", "set", "lo", "up")
    ip("-n", HOSTS[0], "link", "add", "name", CARD, "type", "veth", "peer", "name", CARD, "netns", HOSTS[1])
    for host, address in zip(HOSTS, ADDRESSES):
        ip("-n", host, "address", "add", f"{address}/24", "dev", CARD)
        ip("-n", host, "link", "set", CARD, "up")


def remove_hosts():
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], stderr=subprocess.DEVNULL)


def start(number, folder):
    """Start torchrun on host `number`, 0 or 1; its output goes to a file beside the run folder. Returns the process."""
    command = [
        "ip", "netns", "exec", HOSTS[number], sys.executable, "-m", "torch.distributed.run",
        "--nnodes=2", "--nproc_per_node=1", f"--max-restarts={RESTARTS}",
        "--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:{PORT}",
        f"--rdzv_conf=is_host={number == 0},read_timeout={READ_TIMEOUT}", f"--local_addr={ADDRESSES[number]}",
        *TRAIN, "--res_dir", folder,
    ]  # fmt: skip
    environment = {"GLOO_SOCKET_IFNAME": CARD, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with open(f"{folder}.{HOSTS[number]}.log", "w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def entries(folder):
    path = Path(folder) / "log.jsonl"
    return len(read_log(path)) if path.exists() else 0


def kill_worker(torchruns, folder):
    """Kill the worker of the second host."""
    worker = subprocess.run(
        ["pgrep", "--parent", str(torchruns[1].pid), "--full", "train.py"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    os.kill(int(worker), signal.SIGKILL)


def cut_link(seconds, torchruns, folder):
    """Cut the link between the hosts for some seconds, and say what the run does meanwhile."""
    ip("-n", HOSTS[0], "link", "set", CARD, "down")
    begun = time.monotonic()
    before = entries(folder)
    while time.monotonic() - begun < seconds:
        time.sleep(0.2)
        for host, process in zip(HOSTS, torchruns):
            if process.poll() is not None:
                print(f"    {host}: torchrun ended after {time.monotonic() - begun:.0f} s, code {process.returncode}")
                break
    ip("-n", HOSTS[0], "link", "set", CARD, "up")
    print(f"    the link was down for {time.monotonic() - begun:.0f} s; updates meanwhile: {entries(folder) - before}")


def train(folder, disturb=None):
    """One run on both hosts. Returns whether both torchruns ended well.

    disturb   function of (the two torchrun processes, folder), called in the middle of the run
    """
    begun = time.monotonic()
    torchruns = [start(number, folder) for number in (0, 1)]
    try:
        if disturb:
            while entries(folder) < DISTURBED_AT and all(process.poll() is None for process in torchruns):
                time.sleep(0.02)
            disturb(torchruns, folder)
            disturbed, before = time.monotonic(), entries(folder)
            while entries(folder) <= before and all(process.poll() is None for process in torchruns):
                time.sleep(0.1)
            print(f"    the next update came {time.monotonic() - disturbed:.0f} s later")
        codes = [process.wait(timeout=900) for process in torchruns]
    finally:
        for process in torchruns:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    print(f"    exit codes {codes}, {time.monotonic() - begun:.0f} s")
    if any(codes):
        for host in HOSTS:
            lines = Path(f"{folder}.{host}.log").read_text().splitlines()
            print(f"    {host}:", *lines[-30:], sep="\n      ")
    return not any(codes)


def equal_weights(folder, reference):
    a, b = (read_checkpoint(Path(path) / "last.pt")["model"] for path in (folder, reference))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cut", type=float, default=60, help="seconds without a link")
    parser.add_argument("--keep", help="folder for the runs; by default a temporary one that is removed")
    options = parser.parse_args()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        sys.exit("two_hosts.py needs Linux and root: it makes network namespaces")

    well = True
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(options.keep or scratch).resolve()
        base.mkdir(parents=True, exist_ok=True)
        try:
            join_hosts()
            print("undisturbed")
            reference = str(base / "undisturbed")
            well &= train(reference)
            for name, disturb in (("killed", kill_worker), ("cut", lambda *run: cut_link(options.cut, *run))):
                print(name)
                ended = train(str(base / name), disturb)
                equal = ended and equal_weights(base / name, reference)
                print(f"    the final weights are {'those' if equal else 'NOT those'} of the undisturbed run")
                well &= equal
        finally:
            remove_hosts()
    sys.exit(not well)


if __name__ == "__main__":
    main()
