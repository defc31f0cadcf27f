# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML file: the metrics and the wrong answers, with small copies of their pictures.

Nothing is loaded from elsewhere and nothing runs: the page's policy forbids both, and whatever a file or a model said
is escaped.
"""

import base64
import io
from typing import Any

import jinja2
import PIL.Image

from ..authoring.older_names import public_name
from ..reading.provenance import without_places
from .questions import open_picture
from .scored import TITLES, picture_name


_THUMBNAIL_SIDE = 160

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} on {{ report.dataset }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0 2rem; width: 100%; }
th, td { border-bottom: 1px solid #8886; padding: .45rem .7rem; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; white-space: pre-wrap; unicode-bidi: isolate; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.pictures { white-space: normal; }
img { display: block; margin-bottom: .3rem; max-width: {{ side }}px; }
.note { color: #888; }
</style>
</head>
<body>
<h1>{{ name }} on {{ report.dataset }}</h1>
<p>{{ report.answers | length }} questions of {{ report.num_rows }} rows in {{ "%.0f" | format(report.seconds) }} s;
{% for name, value in report.settings.items() %}{{ name }} {{ value }}{{ ", " if not loop.last else "." }}{% endfor %}
{% if report.num_cut_off %} Answers cut off: {{ report.num_cut_off }}.{% endif %}</p>
<table>
<thead><tr><th>Metric</th><th>Questions</th><th class="number">Value</th><th class="number">95 % interval</th>
<th>Interval by</th></tr></thead>
<tbody>
{% for name, metric in report.metrics.items() %}
<tr><td>{{ titles[name] }}</td><td>{{ metric.n }} {{ metric.kind }}</td>
<td class="number">{{ percent(metric.value) }} %</td>
<td class="number">{{ percent(metric.low) }} to {{ percent(metric.high) }} %</td><td>{{ metric.interval }}</td></tr>
{% endfor %}
</tbody>
</table>
{% if report.unusable %}
<h2>Rows that could not be evaluated: {{ report.unusable | length }}</h2>
<table>
<thead><tr><th class="number">Row</th><th>Reason</th></tr></thead>
<tbody>
{% for fault in report.unusable %}
<tr><td class="number">{{ fault.row }}</td><td dir="auto">{{ short(fault.reason) }}</td></tr>
{% endfor %}
</tbody>
</table>
{% endif %}
<h2>Wrong answers: {{ num_wrong }}</h2>
{% if wrong | length < num_wrong %}<p class="note">The first {{ wrong | length }} are shown.</p>{% endif %}
{% if wrong %}
<table>
<thead><tr><th class="number">Row</th><th>Pictures</th><th>Question</th><th>Expected</th><th>Answer</th>
<th class="number">Recall</th></tr></thead>
<tbody>
{% for answer, pictures in wrong %}
<tr><td class="number">{{ answer.question.row }}</td>
<td class="pictures">{% for name, source in pictures %}{% if source %}<img src="{{ source }}" alt="{{ name }}" \
title="{{ name }}">{% else %}<span class="note">{{ name }} is gone</span>{% endif %}{% endfor %}</td>
<td dir="auto">{{ answer.question.text }}</td><td dir="auto">{{ answer.question.expected }}</td>
<td dir="auto">{{ answer.answer or "(nothing)" }}{{ " …" if answer.cut_off }}</td>
<td class="number">{{ percent(answer.scores["recall"]) ~ " %" if "recall" in answer.scores else "closed" }}</td></tr>
{% endfor %}
</tbody>
</table>
{% endif %}
</body>
</html>
"""


def render_page(report: Any, limit: int) -> str:
    """Returns the page of an `EvaluationReport`, with at most `limit` wrong answers."""
    wrong = report.wrong
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    return template.render(
        report=report,
        name=public_name(report.checkpoint),
        titles=TITLES,
        num_wrong=len(wrong),
        wrong=[(answer, _shown(answer.question.pictures, report.places)) for answer in wrong[:limit]],
        short=lambda text: without_places(text, report.places),
        percent=lambda share: f"{100 * share:.1f}",
        side=_THUMBNAIL_SIDE,
    )


def _shown(pictures: list[Any], places: list[str]) -> list[tuple[str, str | None]]:
    return [(without_places(picture_name(picture), places), _thumbnail(picture)) for picture in pictures]


def _thumbnail(picture: Any) -> str | None:
    """Returns a small copy of a picture as a data URL, or `None` where its file has been taken away since."""
    try:
        small = open_picture(picture)
    except FileNotFoundError:
        return None
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), PIL.Image.Resampling.LANCZOS)
    small.info.clear()  # a comment in the file would be kept
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


__all__ = ["render_page"]
