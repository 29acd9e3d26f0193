"""The studio without a browser: what lives on its stage, what its folder keeps, and what its server refuses."""

import io
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
import torch
from commands import assert_rejected, fastnca_cli

import fastnca
from fastnca.automaton.rule import ALPHA
from fastnca.context import Places
from fastnca.model import DualSpecTNCA
from fastnca.sound.convention import SAMPLE_RATE
from fastnca.sound.files import load_audio
from fastnca.sound.spectrogram import Scale
from fastnca.sound_model import SoundCard
from fastnca.space import Member, Space

pytest.importorskip("starlette", reason="the studio is the extra fastnca[studio]")

from starlette.testclient import TestClient

from fastnca.studio.server import MAX_UPLOAD, make_app, open_studio
from fastnca.studio.session import Studio
from fastnca.studio.stage import Stage

ADDRESS = "http://127.0.0.1:8765"


@pytest.fixture
def stage(finished):
    model = fastnca.load(finished[1], vocoder="griffinlim")
    return Stage(model)


def levels(stage):
    return stage.model.automaton.levels(stage.now.grids)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


class TestStage:
    def test_lives_as_a_rollout_does(self, stage):
        seeds = stage.now.grids
        stage.live(3)
        stage.live()
        assert stage.now.age == 4
        assert same(stage.now.grids, stage.model.automaton.rollout(*seeds, 4, precision="fp32"))

    def test_erases_under_the_brush_alone(self, stage):
        stage.live(14)
        before = stage.now.grids
        stage.brush("linear", [(0.5, 0.2)], 0.1, 0.2, "erase", both=False)
        mel, linear = stage.now.grids
        assert torch.equal(mel, before[0])
        changed = (linear != before[1]).any(dim=1)[0]
        rows, columns = changed.nonzero().T
        assert not linear[0, :, changed].any()
        assert rows.min() >= 0.4 * 513 - 1 and rows.max() <= 0.6 * 513 and columns.max() <= 3
        assert stage.wounded[1] is stage.now

    def test_both_grids_lose_the_same_hertz(self, stage):
        stage.live(14)
        before = levels(stage)
        stage.brush("mel", [(0.5, 0.0), (0.5, 1.0)], 0.1, 0.1, "erase")
        for level, old, centers in zip(levels(stage), before, (80, 513)):
            changed = (level != old).any(dim=1).nonzero()[:, 0] / centers
            assert len(changed) and changed.max() < 0.65

    @pytest.mark.parametrize("mode, sign", [("louder", 1), ("quieter", -1)])
    def test_loudness(self, stage, mode, sign):
        stage.live(14)
        before = levels(stage)[0]
        stage.brush("mel", [(0.5, 0.5)], 0.2, 1.0, mode)
        change = levels(stage)[0] - before
        assert (sign * change >= 0).all() and change.abs().max() == pytest.approx(3.0, abs=0.2)

    def test_noise_keeps_life(self, stage):
        stage.live(14)
        alpha = stage.now.grids[0][:, 1]
        stage.brush("mel", [(0.5, 0.5)], 0.2, 1.0, "noise")
        assert torch.equal(stage.now.grids[0][:, 1], alpha) and stage.now.grids[0].isfinite().all()

    def test_protected_cells_never_change(self, stage):
        stage.live(8)
        stage.brush("mel", [(0.3, 0.5)], 0.1, 1.0, "protect", both=False)
        before, held = stage.now.grids[0], stage.now.held[0]
        assert 0 < held.sum() < held.numel()
        stage.brush("mel", [(0.3, 0.5)], 1.0, 1.0, "erase")
        stage.live(5)
        assert torch.equal(stage.now.grids[0][..., held], before[..., held])
        stage.brush("mel", [(0.3, 0.5)], 1.0, 1.0, "unprotect")
        assert stage.now.held is None

    def test_regrows_a_rectangle_alone(self, stage):
        stage.live(14)
        before = stage.now.grids[1]
        stage.region("regrow", "linear", (0.2, 0.25), (0.4, 0.75))
        inside = ~stage.now.held[1]
        assert not stage.now.grids[1][..., inside].any() and inside.sum() == inside[:, 2].sum() * 4
        stage.live(6)
        assert torch.equal(stage.now.grids[1][..., ~inside], before[..., ~inside])
        assert stage.now.grids[1][..., inside].any()
        stage.region("clear")
        assert stage.now.held is None

    def test_undo_and_redo(self, stage):
        stage.live(5)
        first = stage.now
        for stroke, place in ((1, 0.2), (1, 0.3), (2, 0.8)):
            stage.brush("mel", [(place, 0.5)], 0.05, 0.1, "erase", stroke=stroke)
        last = stage.now
        stage.undo()
        assert stage.now.grids[0][0, :, 64].any() and not stage.now.grids[0][0, :, 24, 4].any()
        stage.undo()
        assert stage.now is first
        stage.undo()
        assert stage.now is first
        stage.redo()
        stage.redo()
        assert stage.now is last and not stage.report()[0]["can_redo"]

    def test_goes_back_to_any_age(self, stage):
        ages = [stage.now.grids]
        for _ in range(100):
            stage.live()
            ages.append(stage.now.grids)
        for age in (7, 50, 99, 0):
            stage.scrub(age)
            assert stage.now.age == age and same(stage.now.grids, ages[age])
        assert stage.oldest == 100
        stage.scrub(30)
        stage.live()
        assert stage.oldest == 31 and same(stage.now.grids, ages[31])

    def test_goes_back_before_and_after_a_wound(self, stage):
        stage.live(10)
        whole = stage.now.grids
        stage.brush("mel", [(0.5, 0.5)], 0.2, 0.5, "erase")
        wounded = stage.now.grids
        for _ in range(90):
            stage.live()
        stage.scrub(9)
        stage.live()
        assert same(stage.now.grids, whole)
        stage.undo()
        assert same(stage.now.grids, whole) and not same(wounded, whole)

    def test_memory_is_bounded(self, stage, monkeypatch):
        monkeypatch.setattr("fastnca.studio.stage.MEMORY", 8 * stage.now.nbytes)
        for _ in range(60):
            stage.live()
            stage.brush("mel", [(0.5, 0.5)], 0.1, 0.1, "noise")
        assert len(stage._past) <= 8 and len(stage._undo) <= 8

    def test_seeds(self, stage):
        stage.restart(empty=True)
        assert stage.report()[0]["alive"] == 0 and stage.now.age == 0
        stage.live(3)
        assert not stage.now.grids[0].any()
        stage.plant("linear", (0.1, 0.5))
        assert all(int((grid[0, 1] > 0).sum()) == 1 for grid in stage.now.grids)
        stage.live(3)
        assert 0 < stage.report()[0]["alive"] < 1
        stage.restart(many=False)
        assert same(stage.now.grids, stage.model.automaton.seed(8))

    def test_shape(self, stage):
        stage.shape(seconds=0.2, time="sustain")
        assert stage.now.n_frames == 17 and stage.now.time == "sustain" and stage.now.age == 0
        stage.live(2)
        stage.undo()
        assert stage.now.n_frames == 8
        stage.live()
        places = stage.model.automaton.places
        if places.pitch_hz:
            stage.shape(semitones=3)
            stage.live()
            tables = stage.model.automaton.tables(8, pitch_hz=places.pitch_hz * 2**0.25)
            assert torch.equal(stage._tables[0][2], tables[2])

    @pytest.mark.parametrize(
        "deed, words",
        [
            (lambda s: s.brush("mel", [(0.5, 0.5)], 0.1, 0.1, "paint"), "unknown brush"),
            (lambda s: s.brush("cello", [(0.5, 0.5)], 0.1, 0.1, "erase"), "unknown grid"),
            (lambda s: s.brush("mel", [], 0.1, 0.1, "erase"), "at least one point"),
            (lambda s: s.brush("mel", [(0.5,)], 0.1, 0.1, "erase"), "a place is"),
            (lambda s: s.brush("mel", [(float("nan"), 0)], 0.1, 0.1, "erase"), "finite"),
            (lambda s: s.brush("mel", [(0.5, 0.5)], 7, 0.1, "erase"), "size is a share"),
            (lambda s: s.region("eat"), "unknown action"),
            (lambda s: s.region("regrow"), "a place is"),
            (lambda s: s.shape(seconds=1e6), "seconds must be a number"),
            (lambda s: s.shape(seconds=True), "seconds must be a number"),
            (lambda s: s.shape(time="bend"), "unknown time"),
            (lambda s: s.picture("hidden", 99), "unknown view"),
        ],
    )
    def test_refuses(self, stage, deed, words):
        before = stage.now
        with pytest.raises(ValueError, match=words):
            deed(stage)
        assert stage.now is before and not stage.report()[0]["can_undo"]


@pytest.fixture
def studio(finished, tmp_path):
    """A Studio with one finished sound, open."""
    studio = Studio(tmp_path / "studio", minutes=1.0, vocoder="griffinlim")
    studio.add_run(finished[1])
    studio.running = False
    yield studio
    studio.close()


@pytest.fixture
def client(studio):
    with TestClient(make_app(studio), base_url=ADDRESS) as client:
        yield client


def post(client, request, **options):
    return client.post(f"/api/{request}", json=options)


def wav(samples, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="WAV", **options)
    return file.getvalue()


def tone(seconds=0.2):
    return 0.5 * np.sin(2 * np.pi * 441 * np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE)


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def status(client):
    return client.get("/api/state").json()["learning"]["status"]


class TestServer:
    def test_state(self, client):
        state = client.get("/api/state").json()
        assert state["sound"]["name"] == "run" and state["sound"]["has_target"]
        assert state["life"]["mel_error_db"] > 0 and state["learning"] is None
        assert state["shape"] == {"semitones": 0.0, "seconds": pytest.approx(0.093), "time": "stretch"}

    def test_pictures(self, client):
        for address in ("frame", "target", "frame?view=alpha", "frame?view=hidden&channel=15"):
            answer = client.get(f"/api/{address}")
            assert answer.status_code == 200 and len(answer.content) == 593 * 8, address
            assert answer.headers["x-frames"] == "8"
        assert client.get("/api/frame?view=hidden&channel=16").status_code == 400
        assert client.get("/api/frame?view=hidden&channel=x").status_code == 400

    def test_a_stroke_answers_with_its_picture(self, client):
        post(client, "life", action="step", steps=14)
        before = client.get("/api/frame")
        answer = post(client, "brush", grid="mel", points=[[0.5, 0.5]], size=0.2, size_time=1, mode="erase", stroke=1)
        assert answer.status_code == 200 and answer.content != before.content
        assert int(answer.headers["x-version"]) > int(before.headers["x-version"])
        assert client.get("/api/frame").content == answer.content
        assert post(client, "undo").status_code == 200
        assert client.get("/api/frame").content == before.content

    def test_life(self, client):
        state = post(client, "life", action="step", steps=3).json()
        assert state["life"]["age"] == 3 and not state["life"]["running"]
        post(client, "life", action="speed", speed=0)
        post(client, "life", action="run")
        wait(lambda: client.get("/api/state").json()["life"]["age"] > 10)
        assert post(client, "life", action="scrub", age=2).json()["life"]["age"] == 2
        assert post(client, "life", action="empty").json()["life"]["alive"] == 0
        assert post(client, "seed", grid="mel", place=[0.5, 0.5]).json()["life"]["alive"] > 0

    @pytest.mark.parametrize("of", ["grown", "target", "growth", "wounded"])
    def test_sounds_decode(self, client, of):
        post(client, "life", action="step", steps=14)
        post(client, "brush", grid="mel", points=[[0.5, 0.5]], size=0.2, mode="erase")
        for bits, subtype in ((16, "PCM_16"), (24, "PCM_24"), (32, "FLOAT")):
            answer = client.get(f"/api/sound?of={of}&bits={bits}")
            assert answer.status_code == 200, answer.text
            with soundfile.SoundFile(io.BytesIO(answer.content)) as file:
                assert file.subtype == subtype and file.frames >= 2048
                assert np.abs(file.read()).max() <= 1

    def test_unknown_sounds(self, client):
        for query in ("of=everything", "of=wounded", "bits=12", "of=take&id=1", "semitones=nan", "semitones=900"):
            answer = client.get(f"/api/sound?{query}")
            assert answer.status_code == 400 and "\n" not in answer.json()["error"], query

    def test_takes(self, client, studio):
        post(client, "life", action="step", steps=10)
        grids = studio.stage.now.grids
        take = post(client, "take", action="keep").json()["takes"][0]
        assert (take["id"], take["name"], take["age"]) == (1, "take 1", 10)
        post(client, "life", action="restart")
        assert post(client, "take", action="rename", id=1, name="früh").json()["takes"][0]["name"] == "früh"
        post(client, "take", action="recall", id=1)
        assert same(studio.stage.now.grids, grids)
        assert len(client.get("/api/take?id=1").content) == 593 * 8
        assert post(client, "take", action="keep").json()["takes"][1]["id"] == 2
        assert [take["id"] for take in post(client, "take", action="forget", id=1).json()["takes"]] == [2]
        for bad in ({"action": "recall", "id": 1}, {"action": "recall", "id": "../1"}, {"action": "rename", "id": 2}):
            assert post(client, "take", **bad).status_code == 400

    def test_exports(self, client, tmp_path):
        post(client, "life", action="step", steps=3)
        model = client.get("/api/export?what=model")
        assert 'filename="run.safetensors"' in model.headers["content-disposition"]
        (tmp_path / "m.safetensors").write_bytes(model.content)
        fastnca.load(tmp_path / "m.safetensors", vocoder="griffinlim")
        assert client.get("/api/export?what=gif").content[:3] == b"GIF"
        assert client.get("/api/export?what=picture").content[1:4] == b"PNG"
        assert "--steps 3" in client.get("/api/export?what=command").text
        assert client.get("/api/export?what=all").status_code == 400

    @pytest.mark.parametrize(
        "name, content, words",
        [
            ("notes.txt", b"hello", "not audio"),
            ("empty.wav", b"", "0 bytes"),
            ("nan.wav", wav(np.full(5000, np.nan), subtype="FLOAT"), "NaN"),
            ("silent.wav", wav(np.zeros(5000)), "silent"),
            ("short.wav", wav(np.ones(10)), "too short"),
            ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "not written by fastnca"),
            ("model.safetensors", b"no model", "damaged"),
            ("../../away.wav", b"RIFF", "not audio"),
        ],
    )
    def test_bad_uploads_leave_nothing(self, client, studio, name, content, words):
        before = sorted(studio.path.rglob("*"))
        answer = client.post("/api/recording", params={"name": name}, content=content)
        assert answer.status_code == 400 and words in answer.json()["error"], answer.text
        assert str(studio.path) not in answer.json()["error"]
        assert sorted(studio.path.rglob("*")) == before
        assert client.get("/api/state").json()["sound"]["name"] == "run"

    def test_too_large_by_header(self, client):
        request = client.build_request("POST", "/api/recording?name=a.wav", content=b"RIFF")
        request.headers["content-length"] = str(2**31)
        answer = client.send(request)
        assert answer.status_code == 413 and f"at most {MAX_UPLOAD // 2**20} MB" in answer.json()["error"]

    def test_a_wav_that_lies_about_its_length(self, client, studio):
        content = bytearray(wav(tone()))
        content[40:44] = (2**31 - 1).to_bytes(4, "little")
        assert client.post("/api/recording?name=lies.wav", content=bytes(content)).status_code == 200
        assert "0.2 s" in client.get("/api/state").json()["sound"]["note"]

    def test_model_file(self, client, finished, studio):
        content = (finished[1] / "model.safetensors").read_bytes()
        state = client.post("/api/recording?name=mine.safetensors", content=content).json()
        assert state["sound"]["name"] == "mine" and not state["sound"]["has_target"]
        assert state["life"]["mel_error_db"] is None
        assert client.get("/api/target").status_code == 400
        assert post(client, "learning", action="longer").status_code == 400

    @pytest.mark.parametrize(
        "headers", [{"host": "evil.example"}, {"host": "127.0.0.1.evil.example:8765"}, {"host": ""}]
    )
    def test_other_names_are_refused(self, client, headers):
        assert client.get("/api/state", headers=headers).status_code == 403

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:8765", "http://127.0.0.1:1"])
    def test_other_pages_are_refused(self, client, origin):
        answer = client.post("/api/undo", json={}, headers={"origin": origin})
        assert answer.status_code == 403 and "own page" in answer.json()["error"]

    def test_own_page_is_let_in(self, client):
        assert client.post("/api/undo", json={}, headers={"origin": ADDRESS}).status_code == 200
        for host in ("localhost:8765", "[::1]:8765"):
            assert client.get("/api/state", headers={"host": host}).status_code == 200

    def test_token(self, studio):
        client = TestClient(make_app(studio, token="secret"), base_url=ADDRESS)
        assert client.get("/api/state").status_code == 403
        assert client.get("/api/state?token=wrong").status_code == 403
        assert client.get("/api/state?token=secret").status_code == 200
        assert client.get("/api/state", headers={"x-token": "secret"}).status_code == 200

    @pytest.mark.parametrize(
        "path", ["/../session.py", "/..%2fsession.py", "/page/index.html", "/api/../../etc/passwd"]
    )
    def test_no_other_file_is_served(self, client, path):
        assert client.get(path).status_code in (404, 403)

    @pytest.mark.parametrize(
        "name, body",
        [
            ("open", b'{"name": "../studio"}'),
            ("open", b'{"name": ".upload-x"}'),
            ("open", b"{"),
            ("open", b"[]"),
            ("open", b"{}"),
            ("life", b'{"action": "fly"}'),
            ("life", b'{"action": "step", "steps": 1e9}'),
            ("life", b'{"action": "step", "step": 1}'),
            ("life", b'{"action": "speed", "speed": "fast"}'),
            ("brush", b'{"grid": "mel", "points": 3, "size": 0.1, "mode": "erase"}'),
            ("brush", b'{"grid": "mel", "points": [[0, 0]], "size": null, "mode": "erase"}'),
            ("region", b'{"action": "regrow", "grid": "mel", "from": [0, 0]}'),
            ("shape", b'{"semitones": "x"}'),
            ("learning", b'{"action": "pause"}'),
            ("learning", b'{"action": "longer", "minutes": -1}'),
            ("take", b'{"action": "recall", "id": 99}'),
        ],
    )
    def test_bad_requests(self, client, name, body):
        answer = client.post(f"/api/{name}", content=body)
        assert answer.status_code == 400 and "\n" not in answer.json()["error"]

    def test_nothing_is_open(self, tmp_path):
        studio = Studio(tmp_path / "s")
        with TestClient(make_app(studio), base_url=ADDRESS) as client:
            assert client.get("/api/state").json()["sound"] is None
            answers = [client.get(f"/api/{name}") for name in ("frame", "target", "sound", "export")]
            answers += [post(client, name) for name in ("undo", "shape")]
            assert all("no sound is open" in answer.json()["error"] for answer in answers)

    def test_full_disk(self, client, studio, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("fastnca.studio.session.write_safetensors", full)
        answer = post(client, "take", action="keep")
        assert answer.status_code == 507 and "disk is full" in answer.json()["error"]
        assert client.get("/api/state").json()["takes"] == []


def save_space(path):
    """A space of four sounds that nobody has taught: "low" and "high" have a pitch, "noise" and "click" have none."""
    torch.manual_seed(0)
    automaton = DualSpecTNCA(context=Places(code_size=3, pitch_hz=220.0), growth=True)
    torch.nn.init.normal_(automaton.update_mlp[-1].weight, std=0.02)
    automaton.update_mlp[-1].bias.data[ALPHA] = 0.2  # so that life spreads and stays
    members = {}
    for name, hertz, n_frames in (("low", 220.0, 24), ("high", 440.0, 16), ("noise", None, 16), ("click", None, 8)):
        card = SoundCard(Scale(0.0, 0.0), n_frames, 4, "griffinlim", None, "default", 7)
        members[name] = Member(torch.randn(3), card, hertz)
    Space(automaton, members, None).save(path)


@pytest.fixture
def space_studio(tmp_path):
    """A Studio in which a space is open, paused."""
    save_space(tmp_path / "four.safetensors")
    studio = Studio(tmp_path / "studio", vocoder="griffinlim")
    studio.add_run(tmp_path / "four.safetensors")
    studio.running = False
    yield studio
    studio.close()


@pytest.fixture
def space_client(space_studio):
    with TestClient(make_app(space_studio), base_url=ADDRESS) as client:
        yield client


def mixture_of(answer):
    return answer.json()["mixture"]


class TestSpace:
    def test_it_opens_with_its_first_sound(self, space_client):
        state = space_client.get("/api/state").json()
        assert state["sounds"] == [{"name": "four", "is_space": True, "epochs": None, "mel_l1_db": None}]
        assert state["mixture"] == {"shares": {"low": 1.0}} and state["sound"]["pitch_hz"] == pytest.approx(220.0)
        assert state["sound"]["note"] == "4 sounds in one rule" and state["learning"] is None
        assert post(space_client, "learning", action="longer").status_code == 400

    def test_map(self, space_client, space_studio):
        sounds = {sound["name"]: sound for sound in space_client.get("/api/map").json()}
        assert {name: tuple(sound["place"]) for name, sound in sounds.items()} == space_studio.space.map()
        assert sounds["high"]["pitch_hz"] == 440.0 and sounds["click"]["pitch_hz"] is None

    def test_a_mixture_grows_at_once(self, space_client, space_studio):
        state = post(space_client, "mix", shares={"low": 3, "noise": 1, "high": 0}).json()
        assert state["mixture"] == {"shares": {"low": 0.75, "noise": 0.25}}
        assert state["life"]["age"] == 44 and state["life"]["alive"] == 1 and state["life"]["n_frames"] == 22
        automaton = space_studio.space.mix({"low": 0.75, "noise": 0.25}).automaton
        expected = automaton.rollout(*automaton.seed(22, 12), 44, precision="fp32")
        for grid, other in zip(space_studio.stage.now.grids, expected, strict=True):
            torch.testing.assert_close(grid, other, rtol=0, atol=1e-4)
        assert post(space_client, "life", action="scrub", age=20).json()["life"]["age"] == 20
        for of in ("of=grown", "of=growth", "of=grown&semitones=1.5"):
            assert space_client.get(f"/api/sound?{of}").status_code == 200

    def test_it_keeps_the_shape(self, space_client):
        post(space_client, "shape", seconds=2 * 24 * 256 / SAMPLE_RATE, semitones=2)
        state = post(space_client, "mix", shares={"high": 1}).json()
        assert state["life"]["n_frames"] == 32 and state["shape"]["semitones"] == 2
        state = post(space_client, "mix", shares={"click": 1}).json()
        assert state["life"]["n_frames"] == 16 and state["shape"]["semitones"] == 0

    def test_a_drag_is_undone_as_one(self, space_client, space_studio):
        for share in (0.1, 0.2, 0.3):
            post(space_client, "mix", shares={"low": share, "high": 1 - share}, stroke=5)
        grids = space_studio.stage.now.grids
        assert mixture_of(post(space_client, "undo")) == {"shares": {"low": 1.0}}
        assert mixture_of(post(space_client, "redo")) == {"shares": {"low": 0.3, "high": 0.7}}
        assert same(space_studio.stage.now.grids, grids)
        before = post(space_client, "life", action="step").json()["life"]
        assert before["age"] == 45

    def test_a_glide_lives(self, space_client, space_studio):
        state = post(space_client, "glide", **{"from": "low", "to": "noise"}).json()
        assert state["mixture"] == {"glide": ["low", "noise"]} and state["life"]["alive"] == 1
        assert state["life"]["n_frames"] == 20 and state["life"]["age"] == 44
        place = {"grid": "mel", "points": [[0.5, 0.5]], "size": 0.2, "mode": "erase"}
        assert post(space_client, "brush", **place).status_code == 200
        assert post(space_client, "life", action="step", steps=5).json()["life"]["age"] == 49
        assert post(space_client, "shape", semitones=3).status_code == 200
        assert space_client.get("/api/sound?of=wounded").status_code == 200
        answer = space_client.get("/api/export?what=model")
        assert answer.status_code == 400 and "no model file holds" in answer.json()["error"]

    def test_a_take_comes_back_with_its_mixture(self, space_client):
        for sounds in ({"shares": {"low": 0.5, "click": 0.5}}, {"shares": {"noise": 1.0}}):
            post(space_client, "mix", **sounds)
            post(space_client, "take", action="keep")
        post(space_client, "glide", **{"from": "high", "to": "low"})
        takes = post(space_client, "take", action="keep").json()["takes"]
        assert [take["name"] for take in takes] == ["low 50%, click 50%", "noise", "high to low"]
        for take in takes:
            state = post(space_client, "take", action="recall", id=take["id"]).json()
            assert state["mixture"] == take["mixture"]
            assert space_client.get(f"/api/sound?of=take&id={take['id']}").status_code == 200

    @pytest.mark.parametrize(
        "recipe, words",
        [
            ({"shares": {"low": 0.5, "noise": 0.5}}, "fastnca morph {} low=0.5 noise=0.5"),
            ({"glide": ["low", "high"]}, "fastnca morph {} low high --glide"),
            ({"shares": {"high": 1}}, "fastnca generate {} --sound high --frames 16 --steps 44 --time stretch"),
        ],
    )
    def test_commands_repeat_it(self, space_client, space_studio, recipe, words, tmp_path):
        space_studio.mix(**recipe)
        command = space_client.get("/api/export?what=command").text
        assert command == words.format(space_studio.path / "four")
        wav = tmp_path / "repeated.wav"
        assert fastnca_cli(*command.split()[1:], "--vocoder", "griffinlim", "-o", wav).exit_code == 0
        assert soundfile.info(wav).frames == 256 * space_studio.stage.now.n_frames

    def test_the_model_of_a_mixture_is_a_model(self, space_client, tmp_path):
        post(space_client, "mix", shares={"low": 0.5, "high": 0.5})
        (tmp_path / "m.safetensors").write_bytes(space_client.get("/api/export?what=model").content)
        assert fastnca.load(tmp_path / "m.safetensors").automaton.places.pitch_hz == pytest.approx(220 * 2**0.5)

    def test_the_last_mixture_is_opened_again(self, space_studio):
        space_studio.mix(glide=["low", "high"])
        space_studio.mix({"low": 1, "high": 1})
        space_studio.open("four")
        assert space_studio.state()["mixture"] == {"shares": {"low": 0.5, "high": 0.5}}
        (space_studio.path / "four" / "mixture.json").write_text('{"shares": {"gone": 1}}')
        space_studio.open("four")
        assert space_studio.state()["mixture"] == {"shares": {"low": 1.0}}

    @pytest.mark.parametrize(
        "request_, options, words",
        [
            ("mix", {"shares": {"../four": 1}}, "there is no sound '../four' in the space; it has low, high"),
            ("mix", {"shares": ["low"]}, "shares must be a number for each"),
            ("mix", {"shares": {"low": "1"}}, "shares must be a number for each"),
            ("mix", {"shares": {"low": True}}, "shares must be a number for each"),
            ("mix", {"shares": {"low": 1, "high": -1}}, "must not be negative"),
            ("mix", {"shares": {}}, "one must be positive"),
            ("mix", {}, "missing"),
            ("glide", {"from": "low", "to": "/etc/passwd"}, "there is no sound '/etc/passwd' in the space"),
            ("glide", {"from": "low", "to": ["high"]}, "a glide goes from one sound to another"),
            ("glide", {"from": "low", "to": "low"}, "a glide goes from one sound to another"),
        ],
    )
    def test_what_is_refused(self, space_client, space_studio, request_, options, words):
        before, files = space_studio.stage.now, sorted(space_studio.path.rglob("*"))
        answer = post(space_client, request_, **options)
        assert answer.status_code == 400 and words in answer.json()["error"] and "\n" not in answer.json()["error"]
        assert space_studio.stage.now is before and sorted(space_studio.path.rglob("*")) == files

    def test_one_sound_cannot_be_mixed(self, client):
        assert client.get("/api/state").json()["mixture"] is None
        for answer in (client.get("/api/map"), post(client, "mix", shares={"run": 1})):
            assert answer.status_code == 400 and "run is one sound" in answer.json()["error"]

    def test_a_space_may_be_dropped(self, space_client, tmp_path):
        content = (tmp_path / "four.safetensors").read_bytes()
        state = space_client.post("/api/recording?name=dropped.safetensors", content=content).json()
        assert state["sound"]["name"] == "dropped" and state["mixture"] == {"shares": {"low": 1.0}}


class TestLearning:
    def test_from_upload_to_longer(self, client, studio):
        state = client.post("/api/recording?name=My tone!.wav", content=wav(tone())).json()
        assert state["sound"]["name"] == "My tone" and state["learning"]["status"] == "learning"
        wait(lambda: client.get("/api/state").json()["learning"]["epoch"] >= 3)
        assert client.get("/api/state").json()["learning"]["mel_l1_db"] > 0
        assert post(client, "learning", action="pause").json()["learning"]["status"] == "paused"
        time.sleep(0.5)
        epoch = studio.learning.report()["epoch"]
        time.sleep(0.5)
        assert studio.learning.report()["epoch"] == epoch
        assert post(client, "learning", action="longer", minutes=2).json()["learning"]["minutes"] == 3
        post(client, "learning", action="go_on")
        wait(lambda: studio.learning.report()["epoch"] > epoch)
        post(client, "learning", action="stop")
        wait(lambda: status(client) == "stopped")
        assert (studio.path / "My tone" / "generated.wav").exists()
        epoch = studio.learning.report()["epoch"]
        assert post(client, "learning", action="longer", minutes=2).json()["learning"]["status"] == "learning"
        wait(lambda: studio.learning.report()["epoch"] > epoch)
        assert len(client.get("/api/losses").json()["epoch"]) >= 3

    def test_leaving_keeps_what_was_learned(self, client, studio):
        client.post("/api/recording?name=a.wav", content=wav(tone()))
        wait(lambda: client.get("/api/state").json()["learning"]["epoch"] >= 2)
        state = post(client, "open", name="run").json()
        assert state["sound"]["name"] == "run" and state["learning"] is None
        state = post(client, "open", name="a").json()
        assert state["learning"]["status"] == "learning" and state["learning"]["epoch"] >= 2

    def test_what_lives_takes_the_newest_rule(self, client, studio):
        client.post("/api/recording?name=a.wav", content=wav(tone()))
        first = studio.stage.model
        wait(lambda: client.get("/api/state") and studio.stage.model is not first)
        assert studio.stage.model.card.epochs > 0

    def test_a_second_studio_is_told(self, studio):
        with pytest.raises(BlockingIOError, match="another studio"):
            Studio(studio.path)

    def test_a_run_in_use_is_told(self, client, studio):
        from fastnca.files import lock

        post_upload = client.post("/api/recording?name=a.wav", content=wav(tone()))
        assert post_upload.status_code == 200
        post(client, "open", name="run")
        held = lock(studio.path / "a" / ".fastnca.lock")
        answer = post(client, "open", name="a")
        assert answer.status_code == 409 and "in use" in answer.json()["error"]
        assert client.get("/api/state").json()["sound"]["name"] == "run"
        held.close()

    def test_diverged(self, client, studio, monkeypatch):
        from fastnca.training.divergence import TrainingDiverged
        from fastnca.training.trainer import Trainer

        def diverge(self):
            raise TrainingDiverged("the loss became nan")

        monkeypatch.setattr(Trainer, "train_epoch", diverge)
        client.post("/api/recording?name=a.wav", content=wav(tone()))
        wait(lambda: status(client) == "failed")
        assert "loss became nan" in client.get("/api/state").json()["learning"]["error"]


@contextmanager
def running_studio(folder, *arguments, port=0):
    """A studio in a process of its own: (the process, its address)."""
    command = [sys.executable, "-m", "fastnca.cli", "studio", *map(str, arguments), "-o", folder, "--no-browser"]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert "the studio is open at http://127.0.0.1:" in line, (line, process.stderr.read())
        yield process, line.split()[5]
    finally:
        process.kill()
        process.wait()


def ask(address, name):
    with urllib.request.urlopen(f"{address}api/{name}", timeout=30) as answer:
        return json.load(answer)


class TestCommand:
    def test_killed_and_opened_again(self, tmp_path):
        soundfile.write(tmp_path / "tone.wav", tone(), SAMPLE_RATE)
        with running_studio(tmp_path / "s", tmp_path / "tone.wav") as (process, address):
            wait(lambda: ask(address, "state")["learning"]["epoch"] >= 1)
            process.kill()
        (tmp_path / "s" / ".upload-1").mkdir()
        with running_studio(tmp_path / "s") as (process, address):
            state = ask(address, "state")
            assert state["sound"]["name"] == "tone" and state["learning"]["status"] == "learning"
            assert not (tmp_path / "s" / ".upload-1").exists()
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=20)
            assert "Traceback" not in "".join(output), output
        with pytest.raises(urllib.error.URLError):
            ask(address, "state")

    def test_refuses_before_it_listens(self, tmp_path, finished):
        (tmp_path / "text.wav").write_text("hello")
        assert_rejected(fastnca_cli("studio", tmp_path / "text.wav", "-o", tmp_path / "s"), "not audio")
        assert_rejected(fastnca_cli("studio", tmp_path / "none.wav"), "no such file")
        assert_rejected(fastnca_cli("studio", "-o", tmp_path / "s", "--minutes", "0"), "positive")
        assert not (tmp_path / "s").exists()

    def test_port_in_use(self, tmp_path):
        import socket

        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            assert_rejected(fastnca_cli("studio", "-o", tmp_path / "s", "--port", port), "choose another --port")

    def test_begins_with_a_run_elsewhere(self, finished, tmp_path, monkeypatch):
        shown = {}

        def run(self, sockets):
            shown.update(self.config.app.app.state.studio.state() if hasattr(self.config.app, "app") else {})

        monkeypatch.setattr("uvicorn.Server.run", run)
        said = []
        open_studio(finished[1], tmp_path / "s", open_browser=False, port=0, say=said.append, vocoder="griffinlim")
        assert (tmp_path / "s" / "run" / "model.safetensors").is_file() and "127.0.0.1" in said[0]


def test_recording_is_kept_as_it_came(studio, tmp_path):
    content = wav(tone())
    studio.add_upload("x.wav", lambda path: path.write_bytes(content))
    kept = studio.path / "x" / "recording.wav"
    assert kept.read_bytes() == content and np.abs(load_audio(kept)[0]).max() > 0.4
