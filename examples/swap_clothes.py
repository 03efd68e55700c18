# %% [markdown]
# # Swap clothes
#
# A notebook as text: open it with Jupytext or an editor that knows `# %%` cells, or run `python examples/swap_clothes.py`.

# %%
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path.cwd() if Path("dgnet.py").exists() else Path.cwd().parent
sys.path.insert(0, str(ROOT))

import dgnet

OUT = Path(tempfile.gettempdir()) / "dgnet-examples"
OUT.mkdir(exist_ok=True)
PEOPLE = ROOT / "examples" / "many"
images = sorted((PEOPLE / "query").glob("*.jpg"))
by_person = {path.name[:4]: path for path in reversed(images)}
people = sorted(by_person.values())[:8]

# %% [markdown]
# The clothes of the first image on the person of the second: `swap` goes through both sides pair by pair, and one image
# serves for all of the other side.

# %%
model = dgnet.load("pretrained", device="cpu")
swaps = model.swap(appearance=people[0], structure=people)
print(swaps.shape, swaps.dtype)

# %% [markdown]
# All combinations as a grid: rows give the clothes, columns pose, body and background.


# %%
def at_size(path: Path) -> np.ndarray:
    """An image at the model's size, (H, W, 3) uint8."""
    return np.asarray(Image.open(path).convert("RGB").resize(model.tested.size[::-1]))


top = np.hstack([np.full_like(swaps[0], 255), *map(at_size, people)])
rows = [np.hstack([at_size(path), *model.swap(appearance=path, structure=people)]) for path in people]
grid = Image.fromarray(np.vstack([top, *rows]))
grid = grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST)
grid.save(OUT / "swaps.png")
print(f"grid of swaps: {OUT / 'swaps.png'}")
grid

# %% [markdown]
# What the id net looks at: `attend` returns a map per head, large where the feature comes from.

# %%
maps = model.attend(people)  # (people, heads, h, w)
upper = (maps[:, :, : maps.shape[2] // 2].sum((2, 3)) / maps.sum((2, 3))).mean(0)
for head, share in zip(model.tested.net.head_names, upper, strict=True):
    print(f"{head} head: {100 * share:.0f} % of what it looks at lies in the upper half")
