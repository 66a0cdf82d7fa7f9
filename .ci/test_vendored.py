"""flowserver.py inside other people's programs, and in many processes at once.

The code is the README's own, taken from there and run as it stands. Flask, Django and
the others are the real ones, in processes of their own.

FLOWSERVER_FILE names another flowserver.py, to see these tests fail on a broken one.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import unittest
import warnings
import wsgiref.util
import wsgiref.validate
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from browser import Browser
from vendored_children import HERE, SERVER, Child, project, wait_for
from vendored_client import (
    CHUNK_SIZE,
    MIB,
    Chunk,
    Client,
    chunks,
    form,
    noise,
)
from vendored_nginx import SAMPLE, Nginx, below_a_path, without
from vendored_s3 import S3
from vendored_snippets import MOST_LINES, lines_of_code, snippet, snippets

# Six chunks, the last of which takes the remainder.
CONTENT = noise(6 * CHUNK_SIZE + 17)
NAME = "Grüße 日本/a+b & c.bin"
SECRET = f"flowserver-{0:032}-1"  # an identifier that nobody else can know

flowserver: ModuleType


def setUpModule() -> None:
    """The program under test under its usual name, for code that imports it."""
    global flowserver
    flowserver = loaded(SERVER)
    logging.getLogger("flowserver").addHandler(logging.NullHandler())


def loaded(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("flowserver", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["flowserver"] = module
    specification.loader.exec_module(module)
    return module


class VendoredCase(unittest.TestCase):
    """What the tests of all ways to embed it need."""

    def setUp(self) -> None:
        self.project = self.enterContext(project())

    def assert_stored(self, files: Mapping[str, bytes]) -> None:
        """These files, whole, and nothing else anywhere."""
        stored = self.project.finished()
        self.assertEqual(sorted(stored), sorted(files))
        for name, content in files.items():
            self.assertTrue(stored[name] == content, f"{name} differs")
        self.assertEqual(self.project.unfinished(), [])

    def check_uploads(self, client: Client) -> None:
        """A file in six chunks, three at a time, and an empty one; nothing else."""
        told = client.upload(NAME, CONTENT)
        self.assertEqual((told["path"], told["size"]), (NAME, len(CONTENT)))
        self.assertEqual(client.upload("empty.txt", b"")["path"], "empty.txt")
        self.assert_stored({NAME: CONTENT, "empty.txt": b""})

    def check_refusal(self, client: Client) -> None:
        """A client that writes all before it reads is told why, not cut off."""
        chunk = Chunk("long.bin", noise(20 * MIB), size=20 * MIB)
        wrong = chunk._replace(content=chunk.content[:MIB], size=MIB)
        body = form(wrong, {}) + chunk.content
        for _ in range(3):
            answer = client.ask("POST", "?" + wrong.query, body)
            self.assertEqual(answer.status, 415)
            self.assertIs(answer.told["success"], False)
            self.assertRegex(answer.told["error"], r"^[A-Z].*\.$")

    def check_cancelling(self, client: Client) -> None:
        """GET knows what is stored, DELETE forgets it."""
        chunk = Chunk("cancelled.bin", CONTENT, identifier=SECRET)
        self.assertEqual(client.send(chunk).told["status"], "partial")
        self.assertEqual(client.test(chunk).status, 200)
        self.assertEqual(client.ask("HEAD", "?" + chunk.query).status, 200)
        self.assertEqual(client.ask("DELETE", "?" + chunk.query).status, 204)
        self.assertEqual(client.test(chunk).status, 204)
        self.assertEqual(self.project.unfinished(), [])


class ReadmeTest(unittest.TestCase):
    """The README's code is short, and none of it is untested."""

    def test_no_snippet_is_long(self) -> None:
        for name, code in snippets().items():
            with self.subTest(name):
                self.assertIn(len(lines_of_code(code)), range(1, MOST_LINES + 1))

    def test_every_snippet_has_a_test_that_runs_it(self) -> None:
        tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
        run = {
            call.args[0].value
            for call in ast.walk(tree)
            if isinstance(call, ast.Call)
            and ast.unparse(call.func) in ("snippet", "self.run_here", "self.serve")
            and call.args
            and isinstance(call.args[0], ast.Constant)
        }
        self.assertEqual(set(snippets()), run)


class InProcessTest(VendoredCase):
    """Without a socket: the application, the store and the parser."""

    def run_here(self, name: str, **given: object) -> dict[str, Any]:
        """Run a snippet in the project's folder; the names that it leaves."""
        self.enterContext(contextlib.chdir(self.project.folder))
        names = {"__name__": "snippet", **given}
        exec(compile(snippet(name), f"README.md: {name}", "exec"), names)
        return names

    def post(self, chunk: Chunk, **headers: str) -> Any:
        """The chunk as a Request with its parameters in the query."""
        return flowserver.Request(
            "POST",
            "/upload",
            chunk.query,
            headers,
            len(chunk.data),
            io.BytesIO(chunk.data).read,
            "192.0.2.1",
        )

    def test_embed(self) -> None:
        uploads = self.run_here("embed")["uploads"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            for chunk in chunks(NAME, CONTENT):
                self.assertEqual(uploads.handle(self.post(chunk)).status, 200)
        path = self.project.upload_dir / NAME
        self.assertEqual(printed.getvalue(), f"{path} {len(CONTENT)}\n")
        self.assert_stored({NAME: CONTENT})

    def test_handle(self) -> None:
        answer = self.run_here("handle")["answer"]
        for chunk in chunks(NAME, CONTENT):
            body, length = io.BytesIO(chunk.data), str(len(chunk.data))
            given = (chunk.query, {"content-length": length}, body, "192.0.2.1")
            status, headers, told = answer("POST", *given)
            self.assertEqual(status, 200)
            self.assertIn(("Content-Type", "application/json"), headers)
        self.assertIn(b'"status":"complete"', told)
        self.assert_stored({NAME: CONTENT})

    def test_hooks(self) -> None:
        uploads = self.run_here("hooks")["uploads"]
        refused = uploads.handle(self.post(Chunk("x.bin", b"x")))
        self.assertIn(b"Log in first.", refused.body)
        self.assertEqual(self.project.finished(), {})
        printed = io.StringIO()
        chunk = Chunk("x.bin", b"x")
        with contextlib.redirect_stdout(printed):
            for project_name in ("one", "../../two"):
                request = self.post(chunk, cookie="a=b; session=3q2-7wQ")
                query = f"{chunk.query}&project={project_name}"
                uploads.handle(request._replace(query=query))
        self.assert_stored({"ann/one/x.bin": b"x"})  # the other path led outside
        place = self.project.upload_dir / "ann/one/x.bin"
        self.assertRegex(
            printed.getvalue(),
            rf"^\S+ ann {re.escape(str(place))} {{'project': 'one'}}\n$",
        )

    def test_store(self) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.run_here("store")
        self.assertEqual(printed.getvalue(), f"{self.project.upload_dir}/film.mkv\n")
        self.assert_stored({"film.mkv": b"0123456789"})

    def test_parser(self) -> None:
        parse = self.run_here("parser")["parse"]
        body = form(Chunk("a.bin", CONTENT[:1000]), {"token": "ä"})
        kind = "multipart/form-data; boundary=----flowserver"
        for size in (1, 7, len(body)):
            blocks = [body[at : at + size] for at in range(0, len(body), size)]
            parts: dict[str, bytes] = {}
            for event in parse(kind, blocks):
                if isinstance(event, flowserver.Part):
                    name = event.name
                    parts[name] = b""
                elif event is not None:
                    parts[name] += event
            self.assertEqual(parts["token"], "ä".encode())
            self.assertTrue(parts["file"] == CONTENT[:1000])
        with self.assertRaises(flowserver.FlowError):
            list(parse(kind, [body[:-9]]))


class PublicNamesTest(unittest.TestCase):
    """What `from flowserver import ...` offers is typed and documented."""

    PROGRAM = HERE / "vendored_program.py"

    def mypy(self, program: str) -> str:
        """What mypy says of a program that has flowserver.py beside it."""
        with project() as folder:
            folder.write("program.py", program)
            command = ["mypy", "--strict", "--no-error-summary", "program.py"]
            cache = [f"--cache-dir={folder.folder}", "--python-version=3.11"]
            run = subprocess.run(
                [sys.executable, "-m", *command, *cache],
                cwd=folder.folder,
                capture_output=True,
                text=True,
            )
            return run.stdout + run.stderr

    def test_a_program_that_uses_them_all_is_strictly_typed(self) -> None:
        text = self.PROGRAM.read_text(encoding="utf-8")
        [imported] = [
            node
            for node in ast.parse(text).body
            if isinstance(node, ast.ImportFrom) and node.module == "flowserver"
        ]
        names = {one.name for one in imported.names}
        self.assertEqual(names, set(flowserver.__all__))
        wrong = 'print(application().handle("GET /health"), FlowServer(3))\n'
        said = self.mypy(text + wrong)
        self.assertEqual(said.count("error:"), 2, said)
        self.assertEqual(said.count("[arg-type]"), 2, said)

    def test_each_is_documented(self) -> None:
        for name in flowserver.__all__:
            with self.subTest(name):
                public = getattr(flowserver, name)
                self.assertRegex(public.__doc__ or "", r"(?s)^\S.{20,}")
                for key, member in vars(public).items() if is_own(public) else ():
                    if not key.startswith("_") and callable(member):
                        self.assertTrue(member.__doc__, f"{name}.{key}")


def is_own(public: object) -> bool:
    return isinstance(public, type) and not issubclass(public, tuple)


class MachineTest(VendoredCase):
    """What --check says of this machine, and systemd of the unit."""

    def check(self, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "flowserver.py", "--config", "", "--check", *flags]
        return subprocess.run(
            command, cwd=self.project.folder, capture_output=True, text=True
        )

    def test_a_good_folder_passes_the_check(self) -> None:
        checked = self.check()
        self.assertEqual((checked.returncode, checked.stderr), (0, ""))
        lines = checked.stdout.splitlines()
        self.assertGreater(len(lines), 5)
        for line in lines:
            self.assertRegex(line, r"^ok +\S")
        self.assertEqual(self.project.unfinished(), [])

    def test_a_temp_folder_elsewhere_fails_the_check(self) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
            here = os.stat(self.project.folder).st_dev
            self.assertNotEqual(os.stat(elsewhere).st_dev, here)
            checked = self.check("--temp-dir", elsewhere)
        self.assertEqual(checked.returncode, 1)
        self.assertRegex(checked.stdout, r"(?m)^FAILED .*same file system.*$")

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd is not installed")
    def test_the_unit_is_good_and_leaves_little_open(self) -> None:
        unit = (HERE.parent / "sample" / "flowserver.service").read_text()
        for path, ours in (
            ("/usr/bin/python3", os.path.realpath(sys.executable)),
            ("/opt/flowserver/flowserver.py", str(SERVER)),
        ):
            self.assertIn(path, unit)
            unit = unit.replace(path, ours)
        file = str(self.project.write("flowserver.service", unit))
        tool = ["systemd-analyze", "--no-pager"]
        for command in (["verify"], ["security", "--offline=yes", "--threshold=15"]):
            run = subprocess.run(
                [*tool, *command, file], capture_output=True, text=True
            )
            # A key that it does not know is no error to it, only a line.
            self.assertEqual((run.returncode, run.stderr), (0, ""), run.stdout)


class WsgiTest(VendoredCase):
    """PEP 3333, held to it by wsgiref.validate."""

    def setUp(self) -> None:
        super().setUp()
        settings = flowserver.Settings(
            upload_dir=str(self.project.upload_dir), allow_origins="https://a.example"
        )
        self.uploads = flowserver.UploadApp(settings)

    def ask(
        self, method: str, path: str, query: str = "", body: bytes = b"", **more: Any
    ) -> tuple[int, dict[str, str], bytes]:
        """One request of a validating server; whatever it complains of is an error."""
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
            "REMOTE_ADDR": "192.0.2.1",
            **more,
        }
        wsgiref.util.setup_testing_defaults(environ)
        answer: list[Any] = []

        def start(status: str, headers: list[tuple[str, str]], *_: Any) -> Any:
            answer[:] = [int(status[:3]), dict(headers)]
            return lambda block: None

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            blocks = wsgiref.validate.validator(self.uploads)(environ, start)
            told = b"".join(blocks)
            blocks.close()  # type: ignore[attr-defined]
        return answer[0], answer[1], told

    def test_every_kind_of_answer_is_valid(self) -> None:
        chunk = Chunk("a.bin", CONTENT, identifier=SECRET)
        kind = "multipart/form-data; boundary=----flowserver"
        rows = [
            ("GET", "/", "", b"", 200),
            ("HEAD", "/", "", b"", 200),
            ("GET", "/health", "", b"", 200),
            ("GET", "/upload", "", b"", 204),
            ("GET", "/upload", chunk.query, b"", 204),
            ("HEAD", "/upload", chunk.query, b"", 204),
            ("OPTIONS", "/upload", "", b"", 204),
            ("POST", "/upload", chunk.query, chunk.data, 200),
            ("GET", "/upload", chunk.query, b"", 200),
            ("HEAD", "/upload", chunk.query, b"", 200),
            ("POST", "/upload", chunk.query, chunk.data[1:], 415),
            ("TRACE", "/upload", "", b"", 405),
            ("GET", "/sample/none.html", "", b"", 404),
            ("DELETE", "/upload", chunk.query, b"", 204),
        ]
        for method, path, query, body, expected in rows:
            for origin in ({}, {"HTTP_ORIGIN": "https://a.example"}):
                with self.subTest(f"{method} {path}?{query[:30]}", **origin):
                    status, _, _ = self.ask(method, path, query, body, **origin)
                    self.assertEqual(status, expected)
        for chunk in chunks("b.bin", CONTENT):
            typed = {"CONTENT_TYPE": kind}
            status, _, _ = self.ask("POST", "/upload", "", form(chunk, {}), **typed)
            self.assertEqual(status, 200)
        self.assertTrue(self.project.finished()["b.bin"] == CONTENT)

    def test_the_page_of_a_mount_links_to_its_upload_address(self) -> None:
        for path, link in (("", "files/upload"), ("/", "upload")):
            status, _, page = self.ask("GET", path, SCRIPT_NAME="/files")
            self.assertEqual(status, 200)
            self.assertIn(f'"uploadPath": "{link}"', str(page))
        self.assertEqual(self.ask("GET", "/upload", SCRIPT_NAME="/files")[0], 204)

    def test_a_mount_at_the_upload_address_itself_takes_chunks(self) -> None:
        chunk = Chunk("x.bin", b"x")
        mounted: Any = {"SCRIPT_NAME": "/api/upload"}
        # The page would be 200, which means to flow.js that the chunk is there.
        self.assertEqual(self.ask("GET", "", chunk.query, **mounted)[0], 204)
        told = self.ask("POST", "", chunk.query, chunk.data, **mounted)
        self.assertEqual(told[0], 200, told)
        self.assert_stored({"x.bin": b"x"})


DJANGO_SETTINGS = """
SECRET_KEY = "not one"
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "urls"
WSGI_APPLICATION = "site_wsgi.application"
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
]
"""
DJANGO_URLS = """
from django.urls import path
import views
urlpatterns = [path("upload", views.upload)]
"""
DJANGO_WSGI = """
import os
os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
from django.core.wsgi import get_wsgi_application
application = get_wsgi_application()
"""

DJANGO_COMMAND = "gunicorn --threads 4 site_wsgi"

# What such a sample looks like; what it did in its functions does not matter here.
FLASK_SAMPLE = """
import os
from flask import Flask, request, send_from_directory

app = Flask(__name__)
temp_base = os.path.abspath("uploads")

@app.route("/")
def page():
    return send_from_directory(".", "page.html")

@app.route("/resumable.js")
def library():
    return send_from_directory(".", "resumable.js")

@app.route("/upload", methods=["GET"])
def resumable_get():
    raise NotImplementedError

@app.route("/upload", methods=["POST"])
def resumable_post():
    raise NotImplementedError

def get_chunk_name(name, number):
    raise NotImplementedError
"""
REPLACED = ("resumable_get", "resumable_post", "get_chunk_name")


class ServersTest(VendoredCase):
    """The real servers and frameworks, each running the README's own code."""

    def serve(self, name: str, file: str, command: str = "", **more: str) -> Child:
        """Save a snippet in a file, and run that or the command."""
        self.project.write(file, snippet(name))
        return self.enterContext(
            self.project.run(command or [sys.executable, file], **more)
        )

    def check_all(self, client: Client) -> None:
        self.check_uploads(client)
        self.check_cancelling(client)
        self.check_refusal(client)

    def test_wsgiref(self) -> None:
        client = self.project.client(self.serve("wsgiref", "app.py"))
        self.check_uploads(client)
        self.check_cancelling(client)
        # What is refused is not read on, since that could take for ever there.

    def test_a_chunk_over_the_limit_is_refused_in_words(self) -> None:
        # The page's chunkSize is larger than the server's: the commonest mistake.
        conf = "[storage]\nupload_dir = uploads\n[limits]\nmax_chunk_size = 1M\n"
        self.project.write("conf.ini", conf)
        child = self.enterContext(self.project.run(snippet("gunicorn")))
        client = self.project.client(child)
        for _ in range(3):
            answer = client.send(Chunk("a.bin", noise(20 * MIB), size=20 * MIB))
            self.assertEqual(answer.status, 413)
            self.assertIn("max_chunk_size", answer.told["error"])

    def test_flask(self) -> None:
        child = self.serve("flask", "app.py", "flask --app app run --port 8000")
        self.check_all(self.project.client(child))

    def test_django(self) -> None:
        self.write_django_site()
        child = self.serve("django", "views.py", DJANGO_COMMAND)
        self.check_all(self.project.client(child))

    def write_django_site(self) -> None:
        self.project.write("settings.py", DJANGO_SETTINGS)
        self.project.write("urls.py", DJANGO_URLS)
        self.project.write("site_wsgi.py", DJANGO_WSGI)

    def check_second_reader(self, file: str, code: str, command: str) -> None:
        """Whoever has read the form already is told what to do about it."""
        self.project.write(file, code)
        child = self.enterContext(self.project.run(command))
        answer = self.project.client(child).send(Chunk("a.bin", CONTENT))
        self.assertGreaterEqual(answer.status, 400)
        self.assertRegex(answer.told["error"], r"request\.form.*request\.POST")
        self.assertEqual(self.project.finished(), {})

    def test_a_form_that_flask_has_read_is_recognised(self) -> None:
        code = snippet("flask").replace("import Flask", "import Flask, request")
        code = code.replace("return uploads", "return request.form and uploads")
        self.check_second_reader("app.py", code, "flask --app app run --port 8000")

    def test_a_form_that_django_has_read_is_recognised(self) -> None:
        self.write_django_site()
        code = snippet("django").replace("answer =", "answer = request.POST and")
        self.check_second_reader("views.py", code, DJANGO_COMMAND)

    def test_django_without_the_exemption_refuses(self) -> None:
        self.write_django_site()
        code = snippet("django").replace("@csrf_exempt\n", "")
        self.project.write("views.py", code)
        child = self.enterContext(self.project.run(DJANGO_COMMAND))
        answer = self.project.client(child).send(Chunk("a.bin", CONTENT))
        self.assertEqual(answer.status, 403, "Django's own refusal")

    def test_fastapi(self) -> None:
        child = self.serve("fastapi", "app.py", "uvicorn --port 8000 app:app")
        self.check_all(self.project.client(child, "/files/upload"))
        page = self.project.client(child, "/files/").ask("GET")
        self.assertIn(b"<!doctype html>", page.body[:15].lower())

    def test_http_server(self) -> None:
        child = self.serve("http-server", "app.py")
        self.check_all(self.project.client(child))
        self.assertEqual(self.project.client(child, "/x").ask("GET").status, 404)

    def test_thread(self) -> None:
        self.project.write("app.py", snippet("thread"))
        program = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=self.project.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with program:
            assert program.stdin is not None and program.stdout is not None
            client = Client(program.stdout.readline().strip() + "/upload")
            self.check_all(client)
            program.stdin.write("\n")
            program.stdin.close()
            self.assertEqual(program.wait(timeout=30), 0)

    def test_waitress(self) -> None:
        self.project.write("conf.ini", "[storage]\nupload_dir = uploads\n")
        child = self.enterContext(self.project.run(snippet("waitress")))
        self.check_all(self.project.client(child))
        self.assertEqual(self.project.client(child, "/x").ask("GET").status, 404)

    def test_gunicorn_with_several_workers(self) -> None:
        self.project.write("conf.ini", "[storage]\nupload_dir = uploads\n")
        log = "--access-logfile - --access-logformat 'worker=%(p)s %(m)s %(s)s'"
        command = snippet("gunicorn")
        child = self.enterContext(self.project.run(command, GUNICORN_CMD_ARGS=log))
        client = self.project.client(child)
        self.check_all(client)
        self.assertEqual(self.project.client(child, "/x").ask("GET").status, 404)
        files = {NAME: CONTENT, "empty.txt": b""}

        def workers_of_the_next_file() -> int:
            known, name = len(child.text()), f"{len(files)}.bin"
            files[name] = noise(100_000, seed=len(files))
            client.upload(name, files[name], size=1000)
            stored = re.findall(r"worker=<(\d+)> POST 200", child.text()[known:])
            return len(set(stored))

        wait_for(lambda: workers_of_the_next_file() == 4, "a file in all four workers")
        for _ in range(5):
            workers_of_the_next_file()
        self.assert_stored(files)
        self.assertNotIn("Traceback", child.text())


def mended_sample(replacement: str) -> str:
    """The sample after what the README says: three functions out, one view in."""
    tree = ast.parse(FLASK_SAMPLE)
    kept = [
        ast.unparse(node)
        for node in tree.body
        if getattr(node, "name", None) not in REPLACED
    ]
    assert len(tree.body) - len(kept) == len(REPLACED)
    return "\n".join([*kept, replacement])


class SiteCase(VendoredCase):
    """The real nginx with sample/nginx.conf, before two processes over one folder."""

    def serve(self, **settings: str) -> Child:
        """One process of those behind nginx, with the README's settings and these."""
        self.project.write("conf.ini", snippet("nginx"))
        command = [sys.executable, "flowserver.py", "--config", "conf.ini"]
        command += ["--port", "0"]
        for name, value in settings.items():
            command += ["--" + name.replace("_", "-"), value]
        return self.enterContext(self.project.run(command))

    def site(self, conf: str = "", **settings: str) -> Nginx:
        """nginx and two servers behind it."""
        self.servers = [self.serve(**settings) for _ in range(2)]
        ports = [int(one.told(r"http://127\.0\.0\.1:(\d+)/")) for one in self.servers]
        return self.enterContext(Nginx(self.project.folder / "nginx", ports, conf))

    def visitor(
        self, nginx: Nginx, path: str = "/upload", address: str = "127.0.0.1"
    ) -> Client:
        """Like a browser on the site's own page."""
        return Client(nginx.url + path, {"Origin": nginx.url}, address, nginx.tls)


class NginxTest(SiteCase):
    """sample/nginx.conf"""

    def check_site(self, nginx: Nginx, path: str = "/upload") -> None:
        client = self.visitor(nginx, path)
        self.check_uploads(client)
        self.check_cancelling(client)
        self.check_refusal(client)
        for server in self.servers:
            self.assertRegex(server.text(), r"POST /upload 200", "each took chunks")
        client.headers["Origin"] = "https://elsewhere.example"
        refused = client.send(Chunk("x.bin", b"x"))
        self.assertIn("elsewhere.example", refused.told["error"])
        self.assertGreaterEqual(refused.status, 400)

    def test_the_sample_as_it_stands(self) -> None:
        nginx = self.site()
        self.check_site(nginx)
        page = self.visitor(nginx, "/").ask("GET")
        self.assertEqual(page.status, 200)
        self.assertEqual(page.body[:15].lower(), b"<!doctype html>")

    def test_a_path_of_another_site(self) -> None:
        nginx = self.site(below_a_path(SAMPLE.read_text(encoding="utf-8")))
        self.check_site(nginx, "/files/upload")
        self.assertEqual(self.visitor(nginx, "/files/").ask("GET").status, 200)
        self.assertEqual(self.visitor(nginx, "/upload").ask("GET").status, 404)
        moved = self.visitor(nginx, "/files").ask("GET")
        self.assertEqual(moved.headers["location"], f"{nginx.url}/files/")

    def test_a_proxy_that_does_not_pass_the_host_on(self) -> None:
        conf = without(SAMPLE.read_text(encoding="utf-8"), "proxy_set_header Host")
        self.check_site(self.site(conf, allow_hosts="files.example.com, flowserver"))

    def test_a_proxy_that_says_nothing(self) -> None:
        conf = without(SAMPLE.read_text(encoding="utf-8"), "proxy_set_header Host")
        conf = without(conf, "proxy_set_header X-Forwarded-")
        # The port is known when nginx has started, the origin before flowserver does.
        alone = {"trusted_proxies": "", "allow_hosts": "flowserver"}
        nginx = self.site(conf, allow_origins="https://files.example.com", **alone)
        client = self.visitor(nginx)
        client.headers["Origin"] = "https://files.example.com"
        self.check_uploads(client)

    def test_nginx_would_refuse_a_chunk_without_the_size_in_the_sample(self) -> None:
        content = noise(2 * MIB - 1)  # one chunk of flow.js's default size
        chunk = Chunk("a.bin", content, size=MIB)
        nginx = self.site()
        self.assertEqual(self.visitor(nginx).send(chunk).status, 200)
        self.assert_stored({"a.bin": content})

    def test_a_body_is_passed_on_while_it_comes(self) -> None:
        client = self.visitor(self.site())
        # One chunk of several blocks: the server waits for a full buffer in the end.
        chunk = Chunk("a.bin", CONTENT, size=len(CONTENT))
        connection = client.connect()
        with contextlib.closing(connection):
            connection.putrequest("POST", "/upload?" + chunk.query)
            connection.putheader("Content-Length", str(len(chunk.data)))
            connection.endheaders(chunk.data[:-1])
            wait_for(self.half_a_chunk_is_on_disk, "the first part of the body")
            connection.send(chunk.data[-1:])
            self.assertEqual(connection.getresponse().status, 200)

    def half_a_chunk_is_on_disk(self) -> bool:
        for path in self.project.upload_dir.glob(".flowserver/**/*"):
            with contextlib.suppress(FileNotFoundError):  # it has gone just now
                if path.stat().st_size > CHUNK_SIZE // 2:
                    return True
        return False

    def test_each_client_has_its_own_address(self) -> None:
        nginx = self.site()
        chunk = Chunk("a.bin", CONTENT, number=2)
        mine = self.visitor(nginx, address="127.0.0.2")
        strangers = self.visitor(nginx, address="127.0.0.3")
        strangers.headers["X-Forwarded-For"] = "127.0.0.2"  # an invention
        for number in (1, 2, 3):
            self.assertEqual(mine.send(chunk._replace(number=number)).status, 200)
        for client, expected in ((mine, 200), (strangers, 204)):
            for _ in self.servers:  # nginx asks them in turn
                self.assertEqual(client.test(chunk).status, expected)
        for server in self.servers:
            self.assertIn("127.0.0.3 GET /upload 204", server.text())


class S3Test(VendoredCase):
    """sample/to_s3.py against moto's server"""

    def setUp(self) -> None:
        super().setUp()
        self.s3 = self.enterContext(S3())
        sample = HERE.parent / "sample" / "to_s3.py"
        self.project.write("sample/to_s3.py", sample.read_text(encoding="utf-8"))
        conf = "[storage]\nupload_dir = uploads\n[server]\nport = 0\n"
        self.project.write("conf.ini", conf)

    def serve(self) -> tuple[Child, Client]:
        program = [sys.executable, os.path.join("sample", "to_s3.py")]
        surroundings = {**self.s3.surroundings, "S3_BUCKET": self.s3.bucket}
        child = self.enterContext(self.project.run(program, **surroundings))
        return child, Client(child.told(r"open (http\S+)/") + "/upload")

    def assert_delivered(self, files: Mapping[str, bytes]) -> None:
        wait_for(lambda: not self.project.finished(), "an empty upload folder")
        objects = self.s3.objects()
        self.assertEqual(sorted(objects), sorted(files))
        for name, content in files.items():
            self.assertTrue(objects[name] == content, f"{name} differs")
        self.assertEqual(self.s3.unfinished(), [])
        self.assertEqual(self.s3.unchecked, 0, "each part has its checksum")

    def test_files_arrive_although_every_request_fails_once(self) -> None:
        self.s3.fails = True
        files = {NAME: noise(17 * MIB), "small.bin": b"x", "empty.txt": b""}
        _, client = self.serve()
        for name, content in files.items():
            client.upload(name, content, size=3 * MIB)
        self.assert_delivered(files)
        self.assertEqual(self.s3.parts, 2)
        self.assertGreaterEqual(self.s3.failures, 6)

    def test_nothing_is_stored_twice_although_every_answer_is_lost_once(self) -> None:
        files = {NAME: noise(17 * MIB), "small.bin": b"x", "empty.txt": b""}
        _, client = self.serve()
        self.s3.forgets = True
        for name, content in files.items():
            client.upload(name, content, size=3 * MIB)
        wait_for(lambda: not self.project.finished(), "an empty upload folder")
        self.s3.forgets = False
        self.assertEqual(sorted(self.s3.objects()), sorted(files))
        self.assertGreaterEqual(self.s3.failures, 6)

    def courier(self) -> tuple[Any, Callable[[str], str]]:
        """A courier of this process, and how it delivers."""
        sample = HERE.parent / "sample" / "to_s3.py"
        spec = importlib.util.spec_from_file_location("to_s3", sample)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        courier = module.Courier(self.s3.client, self.s3.bucket)
        store = module.flowserver.Store(str(self.project.folder / "uploads"))
        return courier, lambda path: courier.deliver(path, store)

    def deliver_when_meanwhile(
        self, happens: Callable[[str], object], content: bytes
    ) -> str:
        """Return why a file is not delivered when this happens on the way."""
        courier, deliver = self.courier()
        path = str(self.project.write("uploads/a.bin", ""))
        Path(path).write_bytes(content)
        really = courier._stored

        def stored(key: str) -> Any:
            courier._stored = really
            happens(path)
            return really(key)

        courier._stored = stored
        with self.assertRaises((RuntimeError, OSError)) as caught:
            deliver(path)
        return str(caught.exception)

    def test_what_another_process_has_delivered_does_not_cost_the_next_file(
        self,
    ) -> None:
        _, deliver = self.courier()

        def another(path: str) -> None:
            deliver(path)
            Path(path).write_bytes(b"the next file of this name")

        said = self.deliver_when_meanwhile(another, CONTENT)
        self.assertEqual(said, "there is a newer one now")
        self.assertEqual(self.s3.objects(), {"a.bin": CONTENT})
        self.assert_stored({"a.bin": b"the next file of this name"})
        self.deliver_when_meanwhile(deliver, b"gone")
        self.assert_stored({})

    def test_a_file_that_is_changed_while_it_is_sent_is_not_sent_mixed(self) -> None:
        for content in (b"x", noise(17 * MIB)):

            def change(path: str, changed: bytes = content[:-1] + b"y") -> None:
                Path(path).write_bytes(changed)

            said = self.deliver_when_meanwhile(change, content)
            self.assertEqual(said, "it was changed meanwhile")
            self.assertEqual((self.s3.objects(), self.s3.unfinished()), ({}, []))

    def test_a_mistake_is_told_in_a_sentence(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for conf, words in (
                ("[storage]\nnonsense = 1\n", "nonsense: there is no such key"),
                (f"[server]\nport = {port}\n", "in use"),
            ):
                self.project.write("conf.ini", conf)
                self.assertIn(words, self.refused())
        self.assertIn("S3_BUCKET", self.refused("--help", status=2))

    def refused(self, *arguments: str, status: int = 1) -> str:
        program = [sys.executable, os.path.join("sample", "to_s3.py"), *arguments]
        surroundings = {**os.environ, **self.s3.surroundings, "S3_BUCKET": "films"}
        ended = subprocess.run(
            program,
            cwd=self.project.folder,
            env=surroundings,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual(ended.returncode, status, ended.stderr)
        self.assertNotIn("Traceback", ended.stderr)
        return ended.stderr

    def test_a_crash_before_the_delivery_loses_nothing(self) -> None:
        self.s3.is_down = True
        child, client = self.serve()
        client.upload(NAME, CONTENT)
        wait_for(lambda: self.s3.failures, "an attempt to deliver")
        child.stop(signal.SIGKILL)
        self.assert_stored({NAME: CONTENT})
        self.s3.is_down = False
        self.serve()
        self.assert_delivered({NAME: CONTENT})

    def test_gunicorn(self) -> None:
        with S3(bucket="films") as self.s3:
            command = snippet("s3")
            child = self.enterContext(self.project.run(command, **self.s3.surroundings))
            self.project.client(child).upload(NAME, CONTENT)
            self.assert_delivered({NAME: CONTENT})

    def test_nothing_in_the_bucket_is_overwritten(self) -> None:
        _, client = self.serve()
        versions = [CONTENT, CONTENT[::-1], CONTENT]
        for content in versions:
            client.upload("a.bin", content)
            wait_for(lambda: not self.project.finished(), "an empty upload folder")
        digest = hashlib.sha256(CONTENT[::-1]).hexdigest()[:16]
        self.assert_delivered({"a.bin": CONTENT, f"a ({digest}).bin": CONTENT[::-1]})


MODULES = HERE / ".tools" / "node_modules"
LIBRARIES = {
    "flow.js": MODULES / "@flowjs" / "flow.js" / "dist" / "flow.js",
    "resumable.js": MODULES / "resumablejs" / "resumable.js",
}

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>a page with an uploader</title>
<input type="file" multiple>
<script src="LIBRARY"></script>
<script>
'use strict';
var finished = [], failed = [], retries = 0, sent = 0;
var uploader = new CLASS(OPTIONS);
uploader.assignBrowse(document.querySelector('input'));
uploader.on('ADDED', function () { uploader.upload(); });
uploader.on('fileProgress', function (file) {
  var done = function (chunk) { return chunk.status() === 'success'; };
  sent = file.chunks.filter(done).length;
});
uploader.on('fileSuccess', function (file, message) {
  finished.push(JSON.parse(message));
});
uploader.on('fileError', function (file, message) { failed.push(message); });
uploader.on('fileRetry', function () { retries += 1; });
</script>
"""


def page(library: str, name: str, added: str, options: str) -> str:
    """A page as its author would write it."""
    text = PAGE.replace("LIBRARY", library).replace("CLASS", name)
    return text.replace("ADDED", added).replace("OPTIONS", options)


class BrowserTest(SiteCase):
    """Real flow.js and resumable.js in a real Chromium."""

    browser: Browser

    @classmethod
    def setUpClass(cls) -> None:
        here = ["--host-resolver-rules=MAP * 127.0.0.1", "--ignore-certificate-errors"]
        cls.browser = Browser(here)
        cls.addClassCleanup(cls.browser.close)

    def choose(self, url: str, content: bytes) -> None:
        """Open the page and give it a file."""
        source = self.project.folder / "chosen" / "long film.bin"
        source.parent.mkdir()
        source.write_bytes(content)
        self.browser.open(url)
        self.browser.set_files("input", [source])

    def assert_arrived(self, content: bytes) -> None:
        self.browser.wait_for("return finished.length + failed.length")
        self.assertEqual(self.browser.run("return failed"), [])
        [told] = self.browser.run("return finished")
        self.assertIs(told["success"], True)
        self.assertTrue(self.project.finished() == {"long film.bin": content})

    def test_one_of_two_servers_is_killed_in_the_middle(self) -> None:
        content = noise(12 * MIB + 17)
        options = "{target: '../upload', maxChunkRetries: 3}"
        shown = page("flow.js", "Flow", "filesSubmitted", options)
        self.project.write("sample/page.html", shown)
        shutil.copy(LIBRARIES["flow.js"], self.project.folder / "sample" / "flow.js")
        nginx = self.site(below_a_path(SAMPLE.read_text(encoding="utf-8")))
        self.browser.network(upload_bytes_per_second=2 * MIB)
        self.choose(nginx.url + "/files/sample/page.html", content)
        self.browser.wait_for("return sent >= 3")
        wait_for(self.killed_with_a_body, "a body under way")
        self.assertLess(self.browser.run("return sent"), 11, "killed in the middle")
        self.browser.network()
        self.assert_arrived(content)
        self.assertGreater(self.browser.run("return retries"), 0, "it was noticed")
        self.serve()  # as systemd would do; what the dead one left behind goes
        wait_for(lambda: not self.project.unfinished(), "an empty temp folder")

    def killed_with_a_body(self) -> bool:
        """Kill a server that is receiving a chunk: bodies are written as they come."""
        for server in self.servers:
            server.process.send_signal(signal.SIGSTOP)  # that it does not end meanwhile
            if any(path.endswith((".data", ".part")) for path in self.opened(server)):
                server.stop(signal.SIGKILL)
                return True
            server.process.send_signal(signal.SIGCONT)
        return False

    def opened(self, server: Child) -> Iterator[str]:
        for descriptor in Path(f"/proc/{server.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield os.readlink(descriptor)

    def test_flask_sample_for_resumable_js(self) -> None:
        content = noise(6 * MIB + 17)
        options = "{target: '/upload'}"
        shown = page("resumable.js", "Resumable", "filesAdded", options)
        self.project.write("page.html", shown)
        shutil.copy(LIBRARIES["resumable.js"], self.project.folder)
        self.project.write("app.py", mended_sample(snippet("flask-sample")))
        child = self.enterContext(self.project.run("flask --app app run --port 8000"))
        self.choose(f"http://127.0.0.1:{child.port}/", content)
        self.assert_arrived(content)
        self.assertEqual(self.project.unfinished(), [])


if __name__ == "__main__":
    unittest.main()
