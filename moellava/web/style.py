# SPDX-License-Identifier: Apache-2.0
"""How the page looks: few colours, system fonts (no other is fetched), the same in light and dark."""

from typing import Any


CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto; }
#mv-title h1 { font-size: 1.4rem; margin: 0; }
#mv-title p { margin: .15rem 0 0; color: var(--body-text-color-subdued); }

#mv-gallery .grid-wrap { padding-top: 2.2rem; }

.mv-chat .message-content .md { white-space: pre-wrap; }
.mv-asked { display: flex; flex-wrap: wrap; gap: .4rem; }
.mv-asked img { margin: 0 !important; min-width: 3rem; max-width: 10rem; border-radius: 3px; }

.mv-note { margin-top: -.6rem; min-height: 1.4em; font-size: .85rem; color: var(--body-text-color-subdued); }
.mv-note .mv-error, .mv-alert p, .mv-banner p {
  margin: 0; padding: .5rem .7rem; border-left: 3px solid var(--error-border-color);
  color: var(--body-text-color); background: var(--background-fill-secondary); overflow-wrap: anywhere;
}
.mv-hint { color: var(--body-text-color-subdued); margin: 0; }

.mv-routing { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.mv-pictures { display: flex; flex-wrap: wrap; gap: .75rem; align-content: flex-start; }
.mv-pictures svg { width: 15rem; height: auto; border-radius: 4px; }
.mv-pictures g { opacity: .5; }
.mv-queries g { opacity: 1; }
.mv-pictures rect:hover { stroke: #fff; stroke-width: 2px; vector-effect: non-scaling-stroke; }
.mv-facts { flex: 1 1 20rem; min-width: 0; }
.mv-load { list-style: none; margin: .4rem 0 1.2rem; padding: 0; max-width: 26rem; font-size: .85rem; }
.mv-load li { display: grid; grid-template-columns: 5rem 1fr 2.6rem; align-items: center; gap: .6rem; margin: 0; }
.mv-load span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.mv-bar i { display: block; height: .7rem; border-radius: 2px; }
.mv-words { margin: .4rem 0 0; font-family: var(--font-mono); font-size: .8rem; line-height: 1.9; }
.mv-words span {
  padding: .1rem .2rem; margin-right: 2px; border-radius: 3px; white-space: pre-wrap;
  background: color-mix(in srgb, var(--expert) 32%, transparent);
}
"""

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> Any:
    """Returns the page's `gradio.themes.Theme`. Fonts given by `Font`, unlike Google's, are never fetched."""
    import gradio as gr

    look = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=[gr.themes.Font(name) for name in _FONT],
        font_mono=[gr.themes.Font(name) for name in _MONO],
    )
    # Darker in light mode than the default, whose contrast is too low to read (2.6 to 1, instead of 4.5).
    return look.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")


__all__ = ["CSS", "theme"]
