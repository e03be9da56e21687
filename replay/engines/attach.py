"""A server that somebody else runs, found by its URL."""

from pathlib import Path
from typing import Self

import aiohttp
import polars as pl

from replay.engines.base import Served
from replay.stream import printable
from replay.workload import through_proxies
from tracegen.errors import ReplayError

_HINT = "is the server running, and is this its address?"


async def ask_models(base_url: str, model: str | None, timeout_s: float, api_key: str | None = None) -> Served:
    """Ask `/v1/models` which models the server has; `model` must be one of them, None takes its only one."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with (
            aiohttp.ClientSession(
                timeout=timeout, headers=bearer(api_key), trust_env=through_proxies(base_url)
            ) as session,
            session.get(f"{base_url}/v1/models") as answer,
        ):
            if answer.status in {401, 403}:
                what = "wants an API key" if api_key is None else "refuses the API key"
                raise ReplayError(f"{base_url} {what} (HTTP {answer.status}); set OPENAI_API_KEY")
            if answer.status != 200:
                raise ReplayError(
                    f"{base_url}/v1/models answers HTTP {answer.status}; is this an OpenAI-compatible server?"
                )
            cards = (await answer.json(content_type=None))["data"]
            found = {str(card["id"]): card for card in cards}
            lengths = {name: card.get("max_model_len") for name, card in found.items()}
            simulated = any("simulated" in str(card.get("owned_by")) for card in cards)
    except aiohttp.ClientConnectorCertificateError as error:
        why = getattr(error.certificate_error, "verify_message", None) or error.certificate_error
        raise ReplayError(
            f"{base_url}: its certificate is not trusted ({why}); name a file with the certificate of who signed it in "
            "the environment variable SSL_CERT_FILE"
        ) from None
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ReplayError(f"{base_url} cannot be reached ({_why(error)}); {_HINT}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ReplayError(
            f"{base_url}/v1/models answers no list of models; is this an OpenAI-compatible server?"
        ) from None
    if model is None and len(found) == 1:
        model = next(iter(found))
    if model not in found:
        asked = f"has no model '{model}'" if model else "serves several models"
        raise ReplayError(
            f"{base_url} {asked}; choose with --model: {', '.join(map(printable, found)) or 'it lists none'}"
        )
    return Served(base_url, model, lengths[model], simulated, api_key)


def bearer(api_key: str | None) -> dict[str, str]:
    """The header that carries `api_key`."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _why(error: BaseException) -> str:
    """A network error in a few words."""
    cause = getattr(error, "os_error", None) or error
    return getattr(cause, "strerror", None) or str(cause) or type(error).__name__


class AttachedEngine:
    """`replay.engines.base.Engine` for a running server."""

    kind = "attached"
    command = None

    def __init__(
        self, url: str, model: str | None, timeout_s: float, api_key: str | None = None, step_log: Path | None = None
    ) -> None:
        """`url` with or without `/v1`; `timeout_s` bounds the first question; `step_log`: its recorder's folder."""
        self.step_log = step_log
        self._api_key = api_key
        self._base_url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        """Nothing to start."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """Nothing to end."""

    async def ready(self) -> Served:
        """Ask the server what it serves."""
        return await ask_models(self._base_url, self._model, self._timeout_s, self._api_key)

    def alive(self) -> bool:
        """A server that is not ours shows its death in its answers only."""
        return True

    def truth(self, run_dir: Path) -> pl.DataFrame | None:
        """A real server's true energies are not known."""
        return None
