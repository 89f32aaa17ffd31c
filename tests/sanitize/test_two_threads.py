"""Two threads on one model each get what one thread got, under ThreadSanitizer."""

from functools import partial

import pytest
from tests.adversarial.kinds._gguf import FlashMoeFixture, GgufFixture
from tests.adversarial.kinds._streamed import Fixture, check
from tests.adversarial.kinds.threads import together

pytestmark = pytest.mark.usefixtures("several_threads")


@pytest.fixture(scope="module", params=[Fixture, GgufFixture, FlashMoeFixture])
def fixture(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("threads"), prompts=4)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("spares", [0, 1])
def test_two_threads_decode_on_one_model(fixture, spares, direct):
    packed = type(fixture) is Fixture  # GGUF's blocks are read as they lie
    model = fixture.model(packed=packed, slots=5, spares=spares, direct=direct)
    together([partial(check, model, prompt) for prompt in fixture.prompts[:2]])


def test_two_threads_decode_on_one_resident_model(fixture):
    """Each records decode steps of its own, and all share the pool."""
    together([partial(check, fixture.resident, prompt) for prompt in fixture.prompts[:2]])
