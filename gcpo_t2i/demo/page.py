"""The tabs in one page."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gcpo_t2i.demo.comparison import comparison_tab, trained_runs
from gcpo_t2i.demo.explain import explain_tab
from gcpo_t2i.demo.generate import generate_tab
from gcpo_t2i.demo.reasoning import reasoning_tab
from gcpo_t2i.demo.runs import list_runs
from gcpo_t2i.demo.studio import Studio
from gcpo_t2i.demo.training import HIDDEN, training_tab

HEAD = """\
# Which parts of an image did the prompt decide?

Reinforcement learning for text-to-image models rewards whole images. gcpo-t2i shares the reward out over the image's parts,
and this page shows how."""
TRAINING = "Training run"
KEPT = 3600  # seconds that pictures and uploads of visitors are kept for
MAX_UPLOAD = "20mb"
CSS = """
.notes { margin: 0; padding: 8px 12px 8px 28px; border-radius: 8px; background: #fef3c7; color: #713f12; font-size: 14px; }
.notes li { list-style: disc; margin: 2px 0; }
.tiles .grid-wrap { height: auto !important; max-height: none !important; min-height: 120px !important; }
.scores th span { font-family: inherit !important; font-size: 13px; }
.scores th button { display: none; }
@media (max-width: 640px) { .tiles .grid-container { grid-template-columns: repeat(2, 1fr) !important; } }
"""


def build(studio: Studio) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title="gcpo-t2i", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(HEAD)
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Generate"):
                generate_tab(studio)
            with gr.Tab("Explain an image"):
                explain_tab(studio)
            with gr.Tab(TRAINING):
                run, timer = training_tab(studio)
            with gr.Tab("Compare"):
                trained = comparison_tab(studio)
            with gr.Tab("Reasoning"):
                answering, reasoner = reasoning_tab(studio)

        def on_tab(followed: str | None, compared: str | None, asked: str | None, event: gr.SelectData) -> list[Any]:
            """Lists of runs as they are now; the timer goes only while its tab is looked at."""
            return [
                choices(list_runs(studio.runs_dir), followed),
                gr.Timer(active=event.value == TRAINING),
                choices(trained_runs(studio), compared),
                choices(reasoner.names(), asked),
            ]

        tabs.select(on_tab, [run, trained, answering], [run, timer, trained, answering], **HIDDEN)
    return page.queue(max_size=studio.config.queue, api_open=False)


def choices(names: list[str], chosen: str | None) -> gr.Dropdown:
    """An update of a list: what was chosen stays, or else the first is."""
    return gr.Dropdown(names, value=chosen if chosen in names else next(iter(names), None))


def serve(page: gr.Blocks, studio: Studio, block: bool = True) -> str:
    """Starts the server and returns its address; with `block`, when it has ended. OSError if the port is taken."""
    config = studio.config
    _, address, _ = page.launch(
        server_name=config.host,
        server_port=config.port,
        auth=config.users(),
        share=False,
        show_error=False,
        quiet=True,
        inbrowser=False,
        allowed_paths=[],
        max_file_size=MAX_UPLOAD,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        footer_links=["gradio"],
        theme=gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
        prevent_thread_lock=True,
    )
    if block:
        print(f"the demo is at {address} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return address
