"""Plots on images: attention overlays, and a grid of every head's mean map.

Images are embedded as small PNGs of at most a few hundred pixels a side, and nothing is fetched.
"""

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Shaped

from headscope.base.arguments import checked
from headscope.errors import InputError
from headscope.plots.figure import SEQUENTIAL, Figure, Theme, dress, label
from headscope.table import AttentionMaps

_SIDE = 320  # pixels of the longer side of an image that is embedded
_CELL = 64  # pixels of one head's map
_GAP = 0.12  # of a cell


def as_picture(image: Any, side: int = _SIDE) -> str:
    """Encode an image as a small PNG in a data URI.

    Args:
        image: array ``[height width channel]``, ``[channel height width]`` or ``[height width]``;
            integers up to 255, or fractions, which are rescaled to the full range, since a model's
            inputs have no fixed range.
        side: maximum pixels of the longer side.

    Raises:
        InputError: if the shape is not an image's, or Pillow is missing.
    """
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not shaped or 0 in array.shape or not np.isfinite(array.astype(float)).all():
        raise InputError(
            f"an image of shape {array.shape} cannot be drawn: give finite numbers [height width] "
            "or [height width channel]."
        )
    if not np.issubdtype(array.dtype, np.integer):
        low, high = float(array.min()), float(array.max())
        array = (array - low) / max(high - low, 1e-12) * 255
    pixels = array.clip(0, 255).round().astype(np.uint8)
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("drawing images needs Pillow: install headscope[images].") from error
    picture = Image.fromarray(
        pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    )
    picture.thumbnail((side, side))
    written = BytesIO()
    picture.save(written, format="PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(written.getvalue()).decode()}"


@checked
def image_overlay(
    image: Shaped[np.ndarray, "..."],
    weights: Float[np.ndarray, "row column"],
    *,
    title: str = "attention",
    caption: str = "",
    boxes: Float[np.ndarray, "box 4"] | Sequence[Sequence[int | float]] | None = None,
    opacity: float = 0.6,
    theme: Theme = "light",
) -> go.Figure:
    """Overlay an image with attention, patch by patch.

    Args:
        image: picture; see :func:`as_picture`.
        weights: attention per patch, e.g. ``maps.of(0, "V1H2")``.
        title: title of the figure.
        caption: plain text below it.
        boxes: frames to draw: left, top, right, bottom as shares of the image.
        opacity: opacity of the overlay, 0 to 1.
        theme: ``light`` or ``dark``.

    Raises:
        InputError: if there is nothing to draw, or a box lies outside the image.

    Example:
        >>> figure = hs.plots.image_overlay(np.zeros((8, 8, 3), np.uint8), np.eye(2))
        >>> figure.data[0].z.shape
        (2, 2)
    """
    values = np.asarray(weights, dtype=float)
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"weights of shape {values.shape} are not [row column] of patches.")
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity={opacity}: give 0 to 1.")
    rows, columns = values.shape
    figure = Figure(
        go.Heatmap(
            z=values,
            x0=0.5,
            dx=1,
            y0=0.5,
            dy=1,
            opacity=opacity,
            colorscale=SEQUENTIAL,
            hovertemplate="row %{y:.0f}, column %{x:.0f}: %{z:.3g}<extra></extra>",
            colorbar={"title": {"text": "attention", "side": "right"}, "thickness": 12},
        )
    )
    figure.add_layout_image(
        source=as_picture(image),
        xref="x",
        yref="y",
        x=0,
        y=0,
        sizex=columns,
        sizey=rows,
        sizing="stretch",
        layer="below",
    )
    for left, top, right, bottom in np.asarray([] if boxes is None else boxes, float).reshape(
        -1, 4
    ):
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise InputError(
                f"the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) is not inside the "
                "image: give left, top, right, bottom as shares of it, 0 to 1."
            )
        figure.add_shape(
            type="rect",
            x0=left * columns,
            x1=right * columns,
            y0=top * rows,
            y1=bottom * rows,
            line={"color": "#d55e00", "width": 2},
        )
    high = 360
    dress(
        figure,
        theme,
        title=label(title),
        subtitle=label(caption, 200),
        width=int(min(900, max(260, high * columns / rows)) + 110),
        height=high + 90,
    )
    figure.update_xaxes(visible=False, range=[0, columns], constrain="domain")
    figure.update_yaxes(visible=False, range=[rows, 0], scaleanchor="x", constrain="domain")
    figure.update_layout(margin={"l": 10, "r": 90, "t": 66, "b": 16})
    return figure


@checked
def head_maps(maps: AttentionMaps, *, theme: Theme = "light") -> go.Figure:
    """Plot the mean maps of all heads as a grid: layers downwards, heads to the right.

    Every map is scaled from 0 to its own maximum, shown in its hover text, since heads that attend
    to few patches would hide all others on a shared scale.

    Args:
        maps: from :func:`headscope.vision.maps`.
        theme: ``light`` or ``dark``.

    Example:
        >>> from headscope.table import AttentionMaps
        >>> weights = np.full((1, 2, 3, 4, 4), 0.05)
        >>> maps = AttentionMaps(weights, (0, 1), "class", "vision")
        >>> hs.plots.head_maps(maps).layout.yaxis.title.text
        'layer'
    """
    layers, heads, rows, columns = maps.mean.shape
    images = "1 image" if len(maps.weights) == 1 else f"{len(maps.weights)} images"
    gap = max(1, round(_GAP * max(rows, columns)))
    down, across = rows + gap, columns + gap
    canvas = np.full((layers * down - gap, heads * across - gap), np.nan)
    text = np.full(canvas.shape, "", dtype=object)
    for layer in range(layers):
        for head in range(heads):
            own = maps.mean[layer, head]
            at = (
                slice(layer * down, layer * down + rows),
                slice(head * across, head * across + columns),
            )
            canvas[at] = own / max(float(own.max()), 1e-12)
            name = maps.head(layer, head)
            text[at] = [
                [f"{name} r{row} c{column}: {own[row, column]:.3g}" for column in range(columns)]
                for row in range(rows)
            ]
    figure = Figure(
        go.Heatmap(
            z=canvas,
            text=text,
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            colorscale=SEQUENTIAL,
            colorbar={
                "title": {"text": "share of the head's largest", "side": "right"},
                "thickness": 12,
            },
        )
    )
    dress(
        figure,
        theme,
        title=f"attention from {label(maps.query)} positions",
        subtitle=f"mean of {images}; each map from 0 to its own largest weight",
        width=160 + min(1400, heads * _CELL),
        height=130 + min(1600, layers * _CELL),
    )
    figure.update_xaxes(
        title_text="head",
        tickvals=[head * across + (columns - 1) / 2 for head in range(heads)],
        ticktext=[str(head) for head in range(heads)],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        title_text="layer",
        tickvals=[layer * down + (rows - 1) / 2 for layer in range(layers)],
        ticktext=[str(layer) for layer in maps.layers],
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(margin={"l": 56, "r": 96, "t": 66, "b": 50})
    return figure
