"""Run the example of each problem, and write its page and pictures to docs/gallery.

    python docs/gallery.py [PROBLEM ...]

The Python block of a page is the code that made its pictures. TV's weight is the best of six for the true images, so TV
has an advantage over the learned regularizer, whose weight is the default.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

import deepreg_fast as dr
from deepreg_fast.status import statuses

OUT = Path(__file__).parent / "gallery"
WEIGHTS = "cs5-ridge-net"
TV_WEIGHTS = (5e-5, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
SIDE = 192
STRIP = 40


class Example(NamedTuple):
    """A page: its title, what is measured, and the lines of code that build the operator."""

    title: str
    text: str
    operator: str
    sigma: float = 0.01
    imports: str = ""
    command: str = ""


KERNELS = "from deepreg_fast.operators import gaussian_kernel\n"
EXAMPLES = {
    "cs": Example(
        "Compressive sensing",
        "One number is measured for every five pixels: random signs, a cosine transform, and a random fifth of its "
        "coefficients (`dr.SRM`). There is no noise. The shipped weights were trained for this problem.",
        "A = dr.SRM((1, 192, 192), ratio=0.2, seed=0)",
        sigma=0.0,
    ),
    "deblur-gaussian": Example(
        "Deblurring: Gaussian",
        "A Gaussian blur with a standard deviation of 1.6 pixels, and noise of 1 % of the range from black to white.",
        "A = dr.Blur((1, 192, 192), gaussian_kernel(25, 1.6))",
        imports=KERNELS,
    ),
    "deblur-motion": Example(
        "Deblurring: motion",
        "A motion of 30 pixels at 45°, and noise of 1 %.",
        "A = dr.Blur((1, 192, 192), motion_kernel(30, 45))",
        imports=KERNELS.replace("gaussian", "motion"),
    ),
    "sr2": Example(
        "Super-resolution by 2",
        "A Gaussian blur, then every second pixel in each direction, and noise of 1 %.",
        "A = dr.SuperResolution((1, 192, 192), gaussian_kernel(25, 1.6), factor=2)",
        imports=KERNELS,
    ),
    "sr3": Example(
        "Super-resolution by 3",
        "A Gaussian blur, then every third pixel in each direction, and noise of 1 %.",
        "A = dr.SuperResolution((1, 192, 192), gaussian_kernel(25, 1.6), factor=3)",
        imports=KERNELS,
    ),
    "inpaint": Example(
        "Inpainting",
        "A random half of the pixels is missing, and the others have noise of 1 %. Any mask `[C, H, W]` of booleans "
        "works: `dr.Inpainting(mask)`.",
        'A = build_operator("inpaint", (1, 192, 192))  # dr.Inpainting of a random mask',
        imports="from deepreg_fast.inverse.problem import build_operator\n",
    ),
    "fourier": Example(
        "Fourier samples",
        "A quarter of the frequencies is measured, more of the low ones, with noise of 1 %, as in magnetic resonance "
        "imaging of a real image. Any mask works: `dr.FourierSampling(mask)`.",
        'A = build_operator("fourier", (1, 192, 192))  # dr.FourierSampling of a random mask',
        imports="from deepreg_fast.inverse.problem import build_operator\n",
    ),
}


def code(name: str) -> str:
    """The Python block of a page."""
    e = EXAMPLES[name]
    measure = f"y = dr.add_noise(A.A(x), sigma={e.sigma}, seed=1)" if e.sigma else "y = A.A(x)"
    weight = f"lam=60, sigma={e.sigma}" if e.sigma else 'mu=meta["mu"]'
    return (
        f"import deepreg_fast as dr\nfrom deepreg_fast.data import embedded_images\n{e.imports}\n"
        f"x = embedded_images(192).held_out.x[::2]  # three photographs, [3, 1, 192, 192] in [0, 1]\n{e.operator}\n"
        f'{measure}\nreg, meta = dr.load("{WEIGHTS}")\n'
        'options = dr.PGDOptions(acceleration="fista", max_iterations=1000, tolerance=1e-3)\n'
        f"sol = dr.recover(y, A, reg, {weight}, options=options)\n"
        "print(dr.psnr(sol.x, x), [dr.Status(s).name for s in sol.status.tolist()])\n"
    )


def command(name: str) -> str:
    """The same on the command line, for a picture of your own."""
    sigma = f" --sigma {EXAMPLES[name].sigma}" if EXAMPLES[name].sigma else ""
    return f"deepreg-fast recover picture.png --problem {name}{sigma} --weights {WEIGHTS} --tolerance 1e-3"


def best_tv(y: torch.Tensor, A: dr.LinearOperator, x: torch.Tensor) -> torch.Tensor:
    """TV's recoveries at the weight with the largest mean PSNR."""
    options = dr.PGDOptions(1000, acceleration="fista")
    recoveries = [dr.recover(y, A, dr.TV(), mu, options=options).x for mu in TV_WEIGHTS]
    return max(recoveries, key=lambda r: float(dr.psnr(r, x).mean()))


def measured_picture(name: str, y: torch.Tensor, A: Any) -> torch.Tensor:
    """What there is before the recovery: the measurements if they are pictures, else the back-projection."""
    if name in ("cs", "fourier"):
        back = A.A_adjoint(y)
        low, high = back.amin((-2, -1), keepdim=True), back.amax((-2, -1), keepdim=True)
        return (back - low) / (high - low) if name == "cs" else back
    return A.as_image(y)


def panel(image: torch.Tensor, caption: str, path: Path) -> None:
    """One picture with its caption below, as WebP."""
    pixels = (image[0].clamp(0, 1) * 255).round().byte().numpy()
    picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    canvas = Image.new("L", (SIDE, SIDE + STRIP), 255)
    canvas.paste(picture, (0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i, line in enumerate(caption.split("\n")):
        draw.text((SIDE / 2, SIDE + 11 + 17 * i), line, fill=0, font=font, anchor="mm")
    canvas.save(path, quality=82, method=6)


def page(name: str) -> None:
    """Run an example and write its page."""
    e = EXAMPLES[name]
    names: dict[str, Any] = {}
    exec(compile(code(name), name, "exec"), names)
    x, y, A, sol = (names[n] for n in ("x", "y", "A", "sol"))
    tv, seen = best_tv(y, A, x), measured_picture(name, y, A)
    scores = [dr.psnr(r, x).tolist() for r in (tv, sol.x)]
    first = "back-projection" if name in ("cs", "fourier") else "measured"
    rows, pictures = [], []
    for i, title in enumerate(("cameraman", "cat", "coffee")):
        rows.append(
            f"| {title} | {scores[0][i]:.2f} | {scores[1][i]:.2f} | {statuses(sol.status)[i].name} "
            f"| {int(sol.gradients[i])} |"
        )
        if i == 2:
            continue
        captions = {
            "measured": (seen[i], first),
            "tv": (tv[i], f"total variation\n{scores[0][i]:.2f} dB"),
            "learned": (sol.x[i], f"{WEIGHTS}\n{scores[1][i]:.2f} dB"),
            "truth": (x[i], "true image"),
        }
        links = []
        for kind, (image, caption) in captions.items():
            file = f"{name}-{title}-{kind}.webp"
            panel(image, caption, OUT / file)
            alt = f"{title}: {caption}".replace("\n", ", ")
            links.append(f'<img src="{file}" alt="{alt}" width="{SIDE}">')
        pictures.append('<p class="panels">\n' + "\n".join(links) + "\n</p>")
    (OUT / f"{name}.md").write_text(TEMPLATE.format(
        title=e.title, text="\n".join(textwrap.wrap(e.text, 120)), pictures="\n\n".join(pictures), code=code(name),
        command=command(name), rows="\n".join(rows), weights=WEIGHTS,
    ), encoding="utf-8")  # fmt: skip
    print(name, scores, sol.status.tolist(), sol.gradients.tolist(), flush=True)


TEMPLATE = """# {title}

{text}

{pictures}

```python
{code}```

On the command line, with a picture of your own that is measured here:

```
{command}
```

| photograph | total variation, PSNR in dB | `{weights}`, PSNR in dB | status | gradients |
|---|---|---|---|---|
{rows}

`docs/gallery.py` wrote this page. Total variation has the best of six weights for the true images; the learned
regularizer has its default weight.
"""

if __name__ == "__main__":
    torch.set_num_threads(1)
    for problem in sys.argv[1:] or EXAMPLES:
        page(problem)
