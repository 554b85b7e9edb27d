"""The certificate of the pixels of a mask: for each of them alone, whether some color of it changes the decision."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np

from weakspot._checks import collected_warnings
from weakspot.classifier import evaluating
from weakspot.explorer.bench import Bench
from weakspot.explorer.messages import Message, Request, RequestError
from weakspot.explorer.pair_sentences import with_cautions
from weakspot.proofs import certify_pixels
from weakspot.proofs.linear_steps import NotSupportedError
from weakspot.proofs.network_steps import bound_network
from weakspot.proofs.rounding_errors import float32_troubles
from weakspot.proofs.sentences import pixel_sentence

COLORS = ("full", "8/255")
SECONDS = 60  # after which the pixels that are left are unknown, unless the page asks for more
MOST_SECONDS = 3600


def provable(bench: Bench, request: Request) -> Message:
    """Why nothing can be proven of this network, in one sentence; None if its layers are supported."""
    exhibit = bench.exhibit(request.whole("image", 0, 10**6, 0))
    with evaluating(bench.classifier) as classifier:
        reason = float32_troubles(classifier)
        if not reason:
            try:
                # Tried on the image, because only the recorded steps tell whether all of them are supported.
                bound_network(classifier, exhibit.pixels)
            except NotSupportedError as error:
                reason = str(error)
    sentence = f"Nothing can be proven of this network: {reason}." if reason else None
    return {"reason": sentence, "seconds": SECONDS}


def certify_mask(bench: Bench, request: Request, send: Callable[[Message], None]) -> Message:
    """Certify the pixels of a mask of the clean image, drawn as the map of `weakspot certify`.

    Args:
        bench: with the image.
        request: image, mask, colors, and the seconds after which the rest stays unknown.
        send: takes the fraction done.
    """
    from weakspot.report.certificate_figure import CertificateView, certificate_chart

    exhibit = bench.exhibit(request.whole("image", 0, 10**6, 0))
    mask = request.mask("mask", exhibit.size)
    if mask is None:
        raise RequestError("mask must be a picture of the brushed pixels, got nothing")
    if (reason := provable(bench, request)["reason"]) is not None:
        raise RequestError(str(reason))
    with collected_warnings() as cautions:
        certificate = certify_pixels(
            bench.classifier,
            exhibit.pixels,
            exhibit.label_tensor,
            region=mask.to(exhibit.pixels.device),
            colors=request.choice("colors", COLORS, COLORS[0]),
            seconds=request.number("seconds", 1, MOST_SECONDS, SECONDS),
            progress=lambda fraction: send({"event": "progress", "fraction": fraction}),
        )
    before = int(exhibit.logits.argmax())
    sentence = pixel_sentence(certificate, 0, before, bench.classifier.class_name)
    view = CertificateView(
        exhibit.pixels[0].cpu().numpy(), certificate.status[0].numpy().astype(np.int8), mask[0, 0].numpy()
    )
    buffer = io.BytesIO()
    certificate_chart(view).savefig(buffer, format="png", dpi=160)
    return {
        "sentence": with_cautions(cautions) + sentence,
        "png": base64.b64encode(buffer.getvalue()).decode("ascii"),
    }
