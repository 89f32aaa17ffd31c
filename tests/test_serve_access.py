"""Who may use the server: keys, host names, pages of other origins; and what it counts."""

import re
import socket

import openai
import pytest
from served import served

from glm_fused.serve.security import Guard
from glm_fused.serve.settings import Settings

CHAT = "/v1/chat/completions"
BODY = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
KEY = "sk-a1B2-c3"


@pytest.fixture(scope="module")
def locked(engine):
    origins = ("https://chat.example",)
    names = ("box.example",)
    with served(engine, api_key=KEY, cors_origins=origins, allowed_hosts=names) as server:
        yield server


def test_a_key_lets_in_as_bearer_or_x_api_key(locked):
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
        assert locked.request("POST", CHAT, BODY, headers)[0] == 200
        assert locked.get("/v1/models", **headers)[0] == 200
        assert locked.get("/metrics", **headers)[0] == 200
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0) as client:
        assert client.models.list().data[0].id == "demo"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY.lower()}"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"x-api-key": ""},
        {"x-api-key": "None"},
        {"x-api-key": "\xe9"},
        {"Authorization": f"Bearer {KEY} {KEY}"},
    ],
    ids=str,
)
def test_without_the_key_there_is_nothing(locked, headers):
    asked = [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/stats")]
    asked += [("POST", "/v1/messages"), ("POST", "/"), ("GET", "/v1/nothing"), ("GET", "/health/")]
    for method, path in asked:
        status, found, body = locked.request(method, path, BODY, headers)
        assert status == 401, (method, path)
        assert found["www-authenticate"] == "Bearer"
        assert "API key" in body["error"]["message"] and KEY not in str(body)
    assert locked.get("/health")[0] == 200


def test_the_openai_client_gets_its_own_error_for_a_wrong_key(locked):
    url = f"{locked.url}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="not the right one") as caught,
    ):
        client.chat.completions.create(**BODY)
    assert caught.value.code == "invalid_api_key"
    status, found = locked.post("/v1/messages", {})
    assert status == 401 and found["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8080", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("attacker.example", 403),
        ("localhost.attacker.example", 403),
        ("attacker.example:8080", 403),
        ("192.168.1.4", 403),
        ("[::1", 403),
        ("", 403),
        ("box.example", 403),
    ],
)
def test_a_name_that_is_rebound_to_this_machine_is_none_of_the_servers(server, host, status):
    assert server.request("POST", CHAT, BODY, {"Host": host})[0] == status
    assert server.request("GET", "/health", None, {"Host": host})[0] == status


def test_further_names_and_bound_addresses(locked):
    headers = {"Host": "box.example:80", "x-api-key": KEY}
    assert locked.request("POST", CHAT, BODY, headers)[0] == 200
    for host, given, known in (
        ("0.0.0.0", "192.168.1.4:8080", True),
        ("0.0.0.0", "attacker.example", False),
        ("::", "[fe80::1]:8080", True),
        ("192.168.1.4", "192.168.1.4", True),
        ("127.0.0.1", "192.168.1.4", False),
        ("box", "box:8080", True),
    ):
        assert Guard(None, Settings(("demo",), host=host))._knows(given) is known


def test_a_page_of_another_origin_cannot_drive_the_server(server):
    for origin in ("https://evil.example", "null", "http://localhost:1", "http://[", "file://"):
        status, headers, found = server.request("POST", CHAT, BODY, {"Origin": origin})
        assert status == 403 and "Origin" in found["error"]["message"]
        assert "access-control-allow-origin" not in headers
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        status, headers, _ = server.request("OPTIONS", CHAT, None, preflight)
        assert status == 403 and "access-control-allow-origin" not in headers
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert server.request("POST", CHAT, BODY, own)[0] == 200
    simple = {"Content-Type": "text/plain"}  # what forms send without asking first
    assert server.request("POST", CHAT, None, simple, raw=b"{}")[0] == 415


def test_a_page_that_is_allowed_can(locked):
    origin = {"Origin": "https://chat.example"}
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    status, headers, _ = locked.request("OPTIONS", CHAT, None, origin | preflight)
    assert status == 200
    assert headers["access-control-allow-origin"] == "https://chat.example"
    assert "authorization" in headers["access-control-allow-headers"].lower()
    status, headers, _ = locked.request("POST", CHAT, BODY, origin | {"x-api-key": KEY})
    assert status == 200 and headers["access-control-allow-origin"] == "https://chat.example"
    status, headers, _ = locked.request("POST", CHAT, BODY, origin)  # it can read what is wrong
    assert status == 401 and headers["access-control-allow-origin"] == "https://chat.example"
    other = {"Origin": "https://evil.example", "x-api-key": KEY}
    status, headers, _ = locked.request("POST", CHAT, BODY, other)
    assert status == 403 and "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ()}, "names is"),
        ({"timeout": 0}, "timeout is 0, expected more than 0"),
        ({"max_batch": -1}, "max_batch is -1"),
        ({"api_key": ""}, "api_key is empty"),
        ({"api_key": "a b"}, "has spaces"),
        ({"api_key": "\xe9"}, "beyond ASCII"),
        ({"cors_origins": ("a.example",)}, "cors_origins has 'a.example'"),
        ({"cors_origins": ("https://a.example/",)}, "expected a scheme, a host"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"names": ("demo",)} | settings)
    assert KEY not in repr(Settings(("demo",), api_key=KEY))
    assert KEY not in str(Settings(("demo",), api_key=KEY).describe())


def test_what_is_no_http_is_refused(server):
    for raw in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/x\r\n\r\n", b"GET\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), 10) as client:
            client.sendall(raw + b"\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 400 ")


def metric(text, name):
    return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def test_metrics_count_requests_tokens_and_times(server):
    before = server.get("/metrics")[1].decode()
    for _ in range(3):
        status, found = server.post(CHAT, BODY | {"max_tokens": 5})
        assert status == 200
    usage = found["usage"]
    assert server.post(CHAT, BODY | {"model": "x"})[0] == 404
    assert server.get("/nothing")[0] == 404
    after = server.get("/metrics")[1].decode()

    def grown(name):
        return metric(after, name) - metric(before, name)

    routes = f'{{method="POST",route="{CHAT}",status="200"}}'
    assert grown(f"glm_fused_requests_total{re.escape(routes)}") == 3
    assert 'route="none",status="404"' in after and "/nothing" not in after
    assert grown("glm_fused_generated_tokens_total") == 15
    assert grown("glm_fused_first_token_seconds_count") == 3
    assert grown("glm_fused_token_seconds_count") == 12
    assert grown("glm_fused_prompt_tokens_total") == 3 * usage["prompt_tokens"]
    assert grown("glm_fused_scheduler_tokens_generated") == 15
    assert metric(after, "glm_fused_scheduler_queued") == 0
