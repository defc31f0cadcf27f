# SPDX-License-Identifier: Apache-2.0
"""The licence of a model that is made of several parts: what all of their licences ask is passed on."""

from collections.abc import Iterable, Mapping


# Licences that ask no more than to keep the notice; all others are passed on by name.
PERMISSIVE = frozenset(
    {"0bsd", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "mit", "unlicense"}
)
UNKNOWN = "unknown"


def license_name(terms: Mapping[str, str] | None) -> str:
    """Returns the name of a part's licence: the Hub's identifier, or that of one that the Hub does not list."""
    if not terms:
        return UNKNOWN
    named = terms.get("license_name") if terms["license"] == "other" else None
    return named or terms["license"]


def combined_license(parts: Iterable[Mapping[str, str] | None]) -> dict[str, str]:
    """Returns `license`, `license_name` and `license_link` of the whole, as a card's metadata has them.

    One licence that all parts have is the whole's. A restrictive one of any part is named under `"other"`, also beside
    parts of unknown licence. Otherwise one unknown part makes the whole unknown.

    Args:
        parts (`Iterable[dict]`): What is known of each part; `None` or empty where nothing is.
    """
    parts = [dict(terms or {}) for terms in parts]
    names = [license_name(terms) for terms in parts]
    if parts and parts[0] and all(terms == parts[0] for terms in parts):
        return parts[0]
    restrictive = [terms for terms, name in zip(parts, names, strict=True) if name not in PERMISSIVE | {UNKNOWN}]
    if not restrictive and (UNKNOWN in names or not names):
        return {"license": UNKNOWN}
    named = sorted(set(names) - {UNKNOWN})
    if len(named) == 1 and UNKNOWN not in names and named[0] in PERMISSIVE:
        return {"license": named[0]}
    links = {terms["license_link"] for terms in restrictive if "license_link" in terms}
    link = {"license_link": links.pop()} if len(links) == 1 else {}
    return {"license": "other", "license_name": "-and-".join(named)} | link


__all__ = ["PERMISSIVE", "UNKNOWN", "combined_license", "license_name"]
