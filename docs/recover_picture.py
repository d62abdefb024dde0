"""Write docs/recover.webp: a blurred photograph, its recovery, the true photograph."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import deepreg_fast as dr
from deepreg_fast.data import embedded_images
from deepreg_fast.operators import motion_kernel

SIDE, STRIP, GAP = 256, 26, 8


def main() -> None:
    """Blur, recover, draw."""
    torch.set_num_threads(1)
    x = embedded_images(SIDE).held_out.x[2:3]
    A = dr.Blur((1, SIDE, SIDE), motion_kernel(15, 30))
    y = dr.add_noise(A.A(x), sigma=0.01, seed=1)
    reg, _ = dr.load("cs5-ridge-net")
    options = dr.PGDOptions(1000, 1e-3, acceleration="fista")
    sol = dr.recover(y, A, reg, lam=60, sigma=0.01, options=options)
    scores = [float(dr.psnr(t, x)[0]) for t in (y, sol.x)]
    print(scores, sol.status.tolist())
    captions = (f"measured: motion and noise, {scores[0]:.1f} dB", f"recovered, {scores[1]:.1f} dB", "true image")
    canvas = Image.new("L", (3 * SIDE + 2 * GAP, SIDE + STRIP), 255)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i, (image, caption) in enumerate(zip((y, sol.x, x), captions, strict=True)):
        left = i * (SIDE + GAP)
        canvas.paste(Image.fromarray((image[0, 0].clamp(0, 1) * 255).round().byte().numpy()), (left, 0))
        draw.text((left + SIDE / 2, SIDE + STRIP / 2), caption, fill=0, font=font, anchor="mm")
    canvas.save(Path(__file__).parent / "recover.webp", quality=85, method=6)


if __name__ == "__main__":
    main()
