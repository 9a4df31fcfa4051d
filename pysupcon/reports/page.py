"""A report as one HTML file, with its pictures inside, that a browser opens without a network."""

from __future__ import annotations

import base64
from pathlib import Path

from pysupcon.reports.report import Report

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 64rem;
         margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
  table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left; }
  th { font-weight: 600; border-bottom: 1px solid #999; } td { border-bottom: 1px solid #eee; }
  td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  td.meaning { color: #555; }
  .warning { border-left: 4px solid #bd1f01; padding-left: .7rem; }
  figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; }
  summary { cursor: pointer; font-weight: 600; margin-top: 2rem; }
</style>
</head>
<body>
{%- macro table(rows) %}
<table>
<tr>{% for name in report.header %}<th>{{ name }}</th>{% endfor %}</tr>
{%- for name, metric in rows %}
{%- set value, interval, unit = metric.columns() %}
<tr><td>{{ name }}</td><td class="number">{{ value }}</td><td class="number">{{ interval }}</td>
<td>{{ unit }}</td><td class="meaning">{{ metric.meaning }}</td></tr>
{%- endfor %}
</table>
{%- endmacro %}
<h1>{{ report.title }}</h1>
{%- for warning in report.warnings %}
<p class="warning"><strong>Warning:</strong> {{ warning }}</p>
{%- endfor %}
{%- for note in report.notes %}
<p>{{ note }}</p>
{%- endfor %}
{%- if report.about_intervals %}
<p>{{ report.about_intervals }}</p>
{%- endif %}
{%- if headline %}
<h2>Summary</h2>
{{- table(headline) }}
{%- endif %}
{%- for picture, data in pictures %}
<figure><img src="data:image/png;base64,{{ data }}" alt="{{ picture.caption }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{%- endfor %}
{%- for group, members in report.groups() %}
<h2>{{ group }}</h2>
{{- table(members) }}
{%- endfor %}
{%- if report.metadata %}
<details><summary>Settings</summary>
<table>
{%- for name, value in report.settings() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{%- endfor %}
</table>
</details>
{%- endif %}
</body>
</html>
"""


def to_html(report: Report, folder: Path) -> str:
    """Return ``report`` as one HTML page; names and captions are shown as they are, never as markup.

    Args:
        report: the report.
        folder: folder that holds its pictures, which are PNG files.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(_TEMPLATE)
    pictures = [
        (picture, base64.b64encode((folder / picture.file).read_bytes()).decode("ascii"))
        for picture in report.pictures
    ]
    headline = [(name, report.metrics[name]) for name in report.headline if name in report.metrics]
    text: str = template.render(report=report, pictures=pictures, headline=headline)
    return text.encode("utf-8", "replace").decode("utf-8") + "\n"
