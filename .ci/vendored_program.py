"""A program that uses every public name of flowserver, for `mypy --strict`."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Optional
from wsgiref.simple_server import make_server

from flowserver import (
    Body,
    Conflict,
    Disk,
    Done,
    FlowError,
    FlowHandler,
    FlowHandlerMixin,
    FlowServer,
    Forbidden,
    Incoming,
    Malformed,
    MultipartParser,
    Part,
    Progress,
    Request,
    Response,
    Settings,
    SettingsError,
    Status,
    Store,
    TooLarge,
    Trouble,
    Truncated,
    Unauthorized,
    Upload,
    UploadApp,
    Whole,
    boundary_of,
    create_app,
    find_config,
    load_settings,
    main,
    safe_path,
    upload_key,
    wsgi_request,
)


def authorize(request: Request) -> Optional[str]:
    if "x-user" not in request.headers:
        raise Unauthorized("Log in first.")
    if request.client.startswith("192.0.2."):
        raise Forbidden("Not from there.")
    return None if request.headers.get("x-user") else "Log in first."


def owner(request: Request) -> str:
    return request.headers["x-user"]


def place(incoming: Incoming) -> str:
    return f"{incoming.owner}/{incoming.fields.get('project', '')}/{incoming.filename}"


def arrived(done: Done) -> None:
    size: int = done.size
    print(done.id, done.path, size, dict(done.fields))


def application() -> UploadApp:
    settings = Settings(upload_dir="uploads", max_file_size="10G", sync=False)
    limit: int = settings.max_file_size
    print(limit, settings.upload_dir.upper())
    hooks = {"authorize": authorize}
    return UploadApp(settings, arrived, hooks["authorize"], owner, place)


def answer(app: UploadApp) -> bytes:
    response: Response = app.handle(Request("GET", "/health"))
    names = [name.lower() for name, _ in response.headers]
    return response.body if response.status == 200 and names else b""


def keep(content: bytes) -> str:
    path = safe_path("films/a.bin")
    store = Store("uploads", disk=Disk(sync=True), announce=arrived)
    key = upload_key("ann", "", "a", path, len(content))
    upload = Upload(key, path, len(content), owner="ann", identifier="a")
    try:
        with store.receive(upload, 0, len(content)) as body:
            progress = stored(body, content)
    except (Conflict, Malformed, TooLarge, Trouble, Truncated) as error:
        return f"{error} ({error.status})"
    received: int = progress.received
    return progress.done.path if progress.done else f"{received} bytes"


def keep_whole(store: Store, blocks: list[bytes], upload: Upload) -> str:
    whole: Whole
    with store.receive_whole(10**9) as whole:
        for block in blocks:
            whole.write(block)
        whole.commit(upload)
    status: Optional[Status] = store.status(upload.key)
    return status.done.path if status and status.done else ""


def stored(body: Body, content: bytes) -> Progress:
    body.write(content)
    return body.commit({"project": "one"})


def parts(content_type: str, body: bytes) -> list[str]:
    boundary = boundary_of(content_type)
    if boundary is None:
        return []
    parser = MultipartParser(boundary, max_parts=3)
    names = [one.name for one in parser.feed(body) if isinstance(one, Part)]
    parser.close()
    return names


class Handler(FlowHandlerMixin, BaseHTTPRequestHandler):
    uploads = application()

    def do_POST(self) -> None:
        self.handle_upload()


class OwnHandler(FlowHandler):
    pass


def serve() -> int:
    try:
        print(load_settings(find_config(None), {"port": "0"}).port + 1)
    except SettingsError as error:
        print(error)
    app = create_app("conf.ini")
    with FlowServer(app, OwnHandler) as server:
        print(server.url.upper())
    make_server("127.0.0.1", 0, app).handle_request()
    ThreadingHTTPServer(("127.0.0.1", 0), Handler).server_close()
    print(wsgi_request({"REQUEST_METHOD": "GET"}).method)
    try:
        return main(["--version"])
    except FlowError as error:
        print(error)
        return 1
