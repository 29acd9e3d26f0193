"""The studio's speed: ``python -m benchmarks.speed.studio`` starts one, lets it learn three seconds of sound, and asks
it as a page does.

Printed: how long a picture of both grids and a stroke of the brush take while it learns, what a page that is open takes
from learning (nobody looking, a page open at what has long been full, and one that paints, which keeps life at its full
pace; turns of TURN seconds, medians of epochs a second), and how much the server's memory grows by a client that asks
for pictures and reads none.
"""

import argparse
import http.client
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastnca.sound.files import write_wav
from fastnca.sound.synthetic import synthesize_bowed_string

from .. import report

TURN = 12.0  # seconds
ROUNDS = 3
STROKE = {"grid": "linear", "points": [[0.1, 0.3], [0.2, 0.4]], "size": 0.05, "mode": "erase"}


class Client:
    """One connection, kept open, as a browser keeps it."""

    def __init__(self, port):
        self.port = port
        self.connection = http.client.HTTPConnection("127.0.0.1", port)

    def ask(self, name, body=None):
        self.connection.request("GET" if body is None else "POST", f"/api/{name}", body)
        answer = self.connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{name}: {content.decode()}")
        return content

    def post(self, name, **options):
        return self.ask(name, json.dumps(options).encode())

    def epoch(self):
        """The last epoch, asked for without looking at what lives."""
        self.connection.close()  # the server has, where nothing was asked for long
        return (json.loads(self.ask("losses"))["epoch"] or [0])[-1]


def look(client, until, paint=False):
    """What a page does until then: the state every 300 ms, and the pictures as they change; a stroke every second."""
    version, painted = None, 0.0
    while time.monotonic() < until:
        begun = time.monotonic()
        if paint and begun - painted > 1.0:
            client.post("brush", **STROKE)
            painted = begun
        state = json.loads(client.ask("state"))
        while time.monotonic() < min(until, begun + 0.3):
            if state["version"] != version:
                client.ask("frame")
                state = json.loads(client.ask("state"))
                version = state["version"]
            time.sleep(0.033)


def epochs_a_second(client, how):
    before, begun = client.epoch(), time.monotonic()
    until = begun + TURN
    if how == "alone":
        time.sleep(TURN)
    else:
        look(client, until, paint=how == "painting")
    return (client.epoch() - before) / (time.monotonic() - begun)


def resident(pid):
    """MB that a process has in memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def stalled(port, pid, requests=2000):
    """MB by which the memory grows where a client asks so often and reads nothing."""
    before = resident(pid)
    with socket.create_connection(("127.0.0.1", port)) as lazy:
        lazy.setblocking(False)
        request = f"GET /api/frame HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
        sent = 0
        begun = time.monotonic()
        while sent < requests and time.monotonic() - begun < 10:
            try:
                lazy.send(request)
                sent += 1
            except BlockingIOError:
                time.sleep(0.01)
        time.sleep(2)
        return resident(pid) - before, sent


def milliseconds(action, count=40):
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - begun))
        time.sleep(0.05)
    return f"{statistics.median(times):.0f} ms, at most {max(times):.0f} ms"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args(arguments).rounds
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "bowed.wav"
        write_wav(sound, synthesize_bowed_string(3.0))
        command = [sys.executable, "-m", "fastnca.cli", "studio", str(sound), "-o", f"{folder}/studio"]
        command += ["--no-browser", "--port", "0", "--vocoder", "griffinlim"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            port = int(re.search(r":(\d+)/", process.stdout.readline())[1])
            client = Client(port)
            until = time.monotonic() + 60
            look(client, until)  # it fills with life, and learns
            print(f"{report.machine()['machine']}, {report.machine()['commit']}, 3 s of sound")
            print("a picture of both grids:", milliseconds(lambda: client.ask("frame")))
            print("a stroke and its picture:", milliseconds(lambda: client.post("brush", **STROKE)))
            client.post("undo")
            look(client, time.monotonic() + 40)  # until it rests again
            speeds = {"alone": [], "open": [], "painting": []}
            for _ in range(rounds):
                for how, found in speeds.items():
                    time.sleep(4)  # nobody looks any more
                    found.append(epochs_a_second(client, how))
                    if how == "painting":
                        look(client, time.monotonic() + 30)
            alone = statistics.median(speeds["alone"])
            for how, found in speeds.items():
                speed = statistics.median(found)
                print(f"{how}: {speed:.2f} epochs a second, {100 * (speed / alone - 1):+.0f} %")
            grown, sent = stalled(port, process.pid)
            print(f"a client that asks {sent} times and reads nothing: {grown:+.1f} MB")
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
