from __future__ import annotations

import base64
import json
from urllib.parse import quote, quote_plus

import pytest

from tunesmith.storage.credentials import Scrubber, malformed, secret_values
from tunesmith.storage.schemes import STORE_KEYS

TOKEN = "hf_Q2x+veRl/9kJ=mN4pT7"
TWO_LINES = "hf_firstLineOfTheToken\nsecondLineOfTheToken"
SECRET = {"HF_TOKEN": TOKEN}


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("HF_TOKEN", TWO_LINES, "has several lines"),
        ("HF_TOKEN", "hf_abc def", "has spaces or tabs"),
        ("HF_TOKEN", "hf_abc\tdef", "has spaces or tabs"),
        ("HF_TOKEN", "hf_abcé", "has characters that are not printable ASCII"),
        ("HF_TOKEN", "hf_abc\x00", "has characters that are not printable ASCII"),
        ("HF_TOKEN", "hf_a\u2028bc", "has several lines"),
        ("AWS_SECRET_ACCESS_KEY", "a\r\nb", "has several lines"),
        ("AWS_ENDPOINT_URL", "http://a b", "has spaces or tabs"),
        ("AZURE_STORAGE_ACCOUNT_KEY", "x" * 70000, "has more than 65536 characters"),
    ],
)
def test_a_malformed_value_is_reported_without_it(key: str, value: str, found: str) -> None:
    sentence = malformed(key, value, "the Secret mine")
    assert sentence is not None
    assert sentence.startswith(f"{key} of the Secret mine {found}: ")
    assert not any(part in sentence for part in value.split() if len(part) > 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [("HF_TOKEN", TOKEN), ("HF_TOKEN", ""), ("GOOGLE_SERVICE_ACCOUNT_KEY", '{\n "a": 1\n}'), ("NOTE", "any thing")],
)
def test_a_well_formed_value_is_not_reported(key: str, value: str) -> None:
    assert malformed(key, value, "the Secret mine") is None


@pytest.mark.parametrize(
    "written",
    [
        TOKEN,
        f"b'Bearer {TOKEN}'",
        repr(TOKEN),
        json.dumps({"token": TOKEN}),
        quote(TOKEN, safe=""),
        quote_plus(TOKEN),
        base64.b64encode(TOKEN.encode()).decode(),
        base64.urlsafe_b64encode(TOKEN.encode()).decode(),
        *(base64.b64encode(f"{'u' * number}:{TOKEN}".encode()).decode() for number in (1, 2, 3)),
        TOKEN[:12],
        f"illegal value {TOKEN[:15]}",
    ],
)
def test_a_credential_is_removed_in_every_form(written: str) -> None:
    text = Scrubber(SECRET).clean(f"the header {written} is refused")
    assert "***" in text
    assert text.startswith("the header ")
    assert text.endswith(" is refused")
    encoded = base64.b64encode(TOKEN.encode()).decode()
    for form in (TOKEN, quote(TOKEN, safe=""), encoded):
        assert not any(form[start : start + 10] in text for start in range(len(form) - 10))


def test_every_line_of_a_value_of_several_lines_is_removed() -> None:
    scrubber = Scrubber({"HF_TOKEN": TWO_LINES})
    for text in (TWO_LINES, repr(TWO_LINES), json.dumps(TWO_LINES), "x secondLineOfTheToken y"):
        assert "LineOfTheToken" not in scrubber.clean(text)


def test_the_parts_of_documents_are_removed() -> None:
    pem = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0\nAQEFAASCBKcwggSjAgEAAoIB\n-----END PRIVATE KEY-----\n"
    connection = "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=Zm9vYmFyYmF6cXV4==;EndpointSuffix=core"
    scrubber = Scrubber(
        {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({"private_key": pem}), "AZURE_STORAGE_CONNECTION_STRING": connection}
    )
    assert scrubber.clean("line AQEFAASCBKcwggSjAgEAAoIB of the key") == "line *** of the key"
    assert scrubber.clean("signed with Zm9vYmFyYmF6cXV4== here") == "signed with *** here"


def test_the_password_of_a_url_is_removed_wherever_it_comes_from() -> None:
    assert Scrubber().clean("no answer of http://me:pass@proxy:8080/x") == "no answer of http://***@proxy:8080/x"


@pytest.mark.parametrize(
    ("value", "text", "expected"),
    [
        ("a", "a cat sat", "a cat sat"),
        ("key", "the key of the monkey", "the key of the monkey"),
        ("abcd", "abcd abcde xabcd 'abcd'", "*** abcde xabcd '***'"),
        ("", "nothing", "nothing"),
        ("   ", "no thing", "no thing"),
    ],
)
def test_short_values_are_not_found_inside_of_words(value: str, text: str, expected: str) -> None:
    assert Scrubber({"HF_TOKEN": value}).clean(text) == expected


def test_addresses_and_regions_are_no_secrets() -> None:
    values = {
        "AWS_ENDPOINT_URL": "http://store.example:9000",
        "AWS_REGION": "eu-central-1",
        "HF_ENDPOINT": "http://hub",
    }
    text = "no answer of http://store.example:9000 in eu-central-1"
    assert Scrubber(values).clean(text) == text


def test_the_texts_of_a_documents_fields_are_cleaned() -> None:
    document = {
        "message": f"a {TOKEN}",
        "uri": TOKEN,
        "list": [{"examples": [TOKEN, 1]}, None],
        "names": {"message": 1},
    }
    assert Scrubber(SECRET).clean_fields(document, frozenset({"message", "examples"})) == {
        "message": "a ***",
        "uri": TOKEN,
        "list": [{"examples": ["***", 1]}, None],
        "names": {"message": 1},
    }


def test_a_word_with_which_a_value_begins_stays() -> None:
    scrubber = Scrubber({"AWS_SECRET_ACCESS_KEY": "tunesmith-secret"})
    assert scrubber.clean("s3://tunesmith/store of tunesmith-secret") == "s3://tunesmith/store of ***"


def test_the_credentials_of_a_process_are_its_stores_variables() -> None:
    assert secret_values({"HF_TOKEN": "x", "PATH": "/bin", "AWS_REGION": ""}) == {"HF_TOKEN": "x"}
    assert "HF_TOKEN" in STORE_KEYS
