"""The studio's server: what the page asks for over HTTP, checked; see docs/studio.md for the requests."""

import errno
import inspect
import json
import secrets
import shutil
import socket
import threading
import webbrowser
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ..sound.files import load_audio
from ..training.trainer import Budget
from .session import Studio, has_model, warm_up, wav_bytes

PAGE = Path(__file__).with_name("page")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
MAX_UPLOAD = 256 * 2**20  # bytes of a recording or a model
MAX_BODY = 2**20  # of any other request
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RefuseStrangers:
    """Lets in only what comes from a page of this server: its name in Host (a page elsewhere whose name was rebound to
    this address has another), its own Origin, and the token where there is one."""

    def __init__(self, app, hosts, token=None):
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and (problem := self._problem(scope)):
            await JSONResponse({"error": problem}, 403, HEADERS)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _problem(self, scope):
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if host.rpartition(":")[0] not in self.hosts and host not in self.hosts:
            return "this studio does not go by that name: use the address that it printed"
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return "only the studio's own page may ask it"
        if self.token and scope["path"].startswith("/api/"):
            given = headers.get("x-token", "")
            for part in scope["query_string"].decode("latin-1").split("&"):
                given = part.removeprefix("token=") if part.startswith("token=") else given
            if not secrets.compare_digest(given.encode(), self.token.encode()):
                return "the token is missing or wrong: use the address that the studio printed"
        return None


class Api:
    """The requests of the page to one Studio."""

    def __init__(self, studio):
        self.studio = studio

    def routes(self):
        reads = {"state": self.state, "losses": self.losses, "frame": self.frame, "target": self.target}
        reads |= {"take": self.take_picture, "sound": self.sound, "export": self.export, "map": self.map}
        deeds = {"builtin": self.builtin, "open": self.open, "learning": self.learning, "life": self.life}
        deeds |= {"brush": self.brush, "seed": self.seed, "region": self.region, "undo": self.undo, "redo": self.redo}
        deeds |= {"shape": self.shape, "take": self.take, "mix": self.mix, "glide": self.glide}
        routes = [Route(f"/api/{name}", _answer(read)) for name, read in reads.items()]
        routes += [Route(f"/api/{name}", self._deed(deed), methods=["POST"]) for name, deed in deeds.items()]
        routes.append(Route("/api/recording", _answer(self.recording), methods=["POST"]))
        for name in ("studio.js", "studio.css"):
            routes.append(Route(f"/{name}", _page(name)))
        return [Route("/", _page("index.html")), *routes]

    def _deed(self, deed):
        async def act(request):
            options = await _json_body(request)
            options = {{"from": "begin", "to": "end"}.get(name, name): value for name, value in options.items()}
            unknown = set(options) - set(inspect.signature(deed).parameters)
            if unknown:
                raise ValueError(f"unknown {', '.join(sorted(unknown))}")
            result = await to_thread.run_sync(lambda: deed(**options))
            return result if isinstance(result, Response) else await self.state(request)

        return _answer(act)

    async def state(self, request):
        return JSONResponse(await to_thread.run_sync(self.studio.state))

    async def losses(self, request):
        return JSONResponse(await to_thread.run_sync(self.studio.losses))

    async def map(self, request):
        return JSONResponse(await to_thread.run_sync(self.studio.map))

    async def frame(self, request):
        self.studio.watch()
        view, channel = request.query_params.get("view", "level"), _number(request, "channel", 2, int)
        return await to_thread.run_sync(lambda: _picture(self.studio.open_stage().picture(view, channel)))

    async def target(self, request):
        return await to_thread.run_sync(lambda: _picture(self.studio.target_picture()))

    async def take_picture(self, request):
        number = _number(request, "id", 0, int)
        return await to_thread.run_sync(lambda: _picture(self.studio.take_picture(number)))

    async def sound(self, request):
        of, bits = request.query_params.get("of", "grown"), _number(request, "bits", 24, int)
        number, semitones = _number(request, "id", None, int), _number(request, "semitones", 0.0, float)
        if not -48 <= semitones <= 48:
            raise ValueError(f"semitones must be from -48 to 48, got {semitones}")
        wav = await to_thread.run_sync(lambda: wav_bytes(self.studio.samples(of, number, semitones), bits))
        name = f"{self.studio.name}_{of}.wav" if request.query_params.get("download") else None
        return Response(wav, media_type="audio/wav", headers=_attachment(name))

    async def export(self, request):
        what = request.query_params.get("what", "model")
        content, name = await to_thread.run_sync(lambda: self.studio.export(what))
        kind = "text/plain; charset=utf-8" if what == "command" else "application/octet-stream"
        return Response(content, media_type=kind, headers=_attachment(name))

    async def recording(self, request):
        name = request.query_params.get("name") or "sound.wav"
        _check_length(request, MAX_UPLOAD, "a recording may have")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_UPLOAD:
                raise _TooLarge(f"a recording may have at most {MAX_UPLOAD // 2**20} MB")
        if not body:
            raise ValueError(f"{name} is empty: 0 bytes arrived")
        await to_thread.run_sync(lambda: self.studio.add_upload(name, lambda path: path.write_bytes(body)))
        return await self.state(request)

    def builtin(self):
        self.studio.add_builtin()

    def open(self, name):
        self.studio.open(name)

    def learning(self, action, minutes=5.0):
        self.studio.learn(action, minutes)

    def life(self, action, steps=1, age=0, speed=8.0, seeds="many"):
        self.studio.live(action, steps, age, speed, seeds)

    def brush(self, grid, points, size, mode, size_time=None, both=True, stroke=None):
        stage = self.studio.open_stage()
        if not isinstance(points, list) or len(points) > 2048:
            raise ValueError("points must be a list of at most 2048 places")
        stage.brush(grid, points, size, size if size_time is None else size_time, mode, both, stroke)
        return _picture(stage.picture())

    def seed(self, grid, place):
        self.studio.open_stage().plant(grid, place)

    def region(self, action, grid="mel", begin=None, end=None):
        self.studio.open_stage().region(action, grid, begin, end)

    def undo(self):
        self.studio.open_stage().undo()

    def redo(self):
        self.studio.open_stage().redo()

    def shape(self, semitones=None, seconds=None, time=None):
        self.studio.open_stage().shape(semitones, seconds, time)

    def take(self, action, id=None, name=None):
        self.studio.take(action, id, name)

    def mix(self, shares, stroke=None):
        self.studio.mix(shares, stroke=stroke)

    def glide(self, begin, end):
        self.studio.mix(glide=(begin, end))


class _TooLarge(ValueError):
    pass


def _answer(endpoint):
    """What goes wrong is told in one line; what is nobody's fault but ours as such."""

    async def answer(request):
        try:
            response = await endpoint(request)
        except _TooLarge as error:
            response = _error(error, 413)
        except ClientDisconnect:
            return Response(status_code=400)
        except (ValueError, TypeError) as error:
            response = _error(error, 400)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            response = _error("the disk is full: nothing was written" if full else error, 507 if full else 409)
        except Exception as error:  # noqa: BLE001 (the page should hear of it)
            response = _error(f"{type(error).__name__}: {error}", 500)
        response.headers.update(HEADERS)
        return response

    return answer


def _error(error, status):
    return JSONResponse({"error": " ".join(str(error).split()) or type(error).__name__}, status)


def _page(name):
    async def page(request):
        return FileResponse(PAGE / name, headers=HEADERS)

    return page


def _picture(picture):
    content, version, age, n_frames = picture
    headers = {"X-Version": str(version), "X-Age": str(age), "X-Frames": str(n_frames)}
    return Response(content, media_type="application/octet-stream", headers=headers)


def _attachment(name):
    if name is None:
        return {}
    plain = name.encode("ascii", "replace").decode().replace("?", "_").replace('"', "_")
    return {"Content-Disposition": f'attachment; filename="{plain}"'}


def _number(request, name, default, kind):
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text[:40]!r}") from None


def _check_length(request, most, what):
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        raise _TooLarge(f"{what} at most {most // 2**20} MB")


async def _json_body(request):
    _check_length(request, MAX_BODY, "a request may have")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise _TooLarge(f"a request may have at most {MAX_BODY // 2**20} MB")
    try:
        options = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise ValueError("the request is no JSON") from None
    if not isinstance(options, dict):
        raise ValueError("the request must be a JSON object")
    return options


def make_app(studio, hosts=LOOPBACK, token=None):
    """The ASGI application of one Studio, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(app):
        threading.Thread(target=warm_up, daemon=True).start()
        yield
        await to_thread.run_sync(studio.close)

    app = Starlette(routes=Api(studio).routes(), lifespan=lifespan)
    app.add_middleware(RefuseStrangers, hosts=hosts, token=token)
    return app


def bind(host, port):
    """A listening socket. Where no ``port`` is asked for it is 8765, or any that is free.

    Raises OSError that names the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for wanted in (8765, 0) if port is None else (port,):
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, wanted))
            listening.listen(64)  # who comes before the server is up waits
            return listening
        except OSError as error:
            listening.close()
            if port is not None or wanted == 0:
                raise OSError(f"cannot listen at {host}:{wanted}: {error.strerror}; choose another --port") from error


def open_studio(
    path=None, out="fastnca-studio", *, host="127.0.0.1", port=None, open_browser=True, say=print, **options
):
    """Serve a studio until Ctrl-C.

    Args:
        path: a recording to begin with, a finished run or a space to open, or a studio's folder, then in the place of
            ``out``.
        out: the studio's folder. host, port: where to listen, see :func:`bind`. say: is told the page's address.
        options: of the Studio.

    Raises ValueError, OSError for bad input, before it listens.
    """
    Budget(minutes=options.get("minutes", 1.0))  # raises where it is none
    path = None if path is None else Path(path)
    if path is not None and not path.exists():
        raise FileNotFoundError(
            f"no such file or folder: {path}; give a recording, a finished run, a space or a studio's folder"
        )
    begin = path
    if path is not None and path.is_dir() and not has_model(path):
        out, begin = path, None
    if begin is not None and begin.is_file() and begin.suffix != ".safetensors":
        load_audio(begin, options.get("duration"))  # raises where it is no recording
    listening = bind(host, port)
    studio = Studio(out, **options)
    try:
        if begin is not None and (begin.is_dir() or begin.suffix == ".safetensors"):
            studio.add_run(begin)
        elif begin is not None:
            studio.add_upload(begin.name, lambda place: shutil.copyfile(begin, place))
        else:
            studio.open_last()
    except BaseException:
        studio.close()
        raise
    port = listening.getsockname()[1]
    local = host in ("127.0.0.1", "localhost", "::1")
    token = None if local else secrets.token_urlsafe(12)
    name = f"[{host}]" if ":" in host else host
    if host in ("0.0.0.0", "::"):
        name = socket.gethostname()
    address = f"http://{name}:{port}/" + (f"?token={token}" if token else "")
    app = make_app(studio, LOOPBACK if local else (*LOOPBACK, name, host), token)
    config = uvicorn.Config(app, log_level="warning", limit_concurrency=64, timeout_graceful_shutdown=1)
    say(f"the studio is open at {address} (Ctrl-C closes it; everything is kept in {studio.path})")
    if open_browser:
        threading.Timer(0.5, webbrowser.open, (address,)).start()
    uvicorn.Server(config).run(sockets=[listening])
