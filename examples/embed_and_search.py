# %% [markdown]
# # Embed images and search a folder
#
# A notebook as text: open it with Jupytext or an editor that knows `# %%` cells, or run
# `python examples/embed_and_search.py`. It takes half a minute on a CPU. The people are drawn; put a folder of
# photographs and a run trained on photographs in their place.

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
query, gallery = (sorted((PEOPLE / folder).glob("*.jpg")) for folder in ("query", "bounding_box_test"))

# %% [markdown]
# `load` takes the name of a run, of a teacher, or an ONNX file of `export.py`. `embed` takes paths, Pillow images, arrays
# and tensors of any size, and returns a vector per head: (images, heads, 512).

# %%
model = dgnet.load("pretrained", device="cpu")
features = model.embed(query[:3])
print(model, features.shape)

# %% [markdown]
# Scores are inner products. `rank` orders one set of features for each of another.

# %%
order, scores = dgnet.rank(features, model.embed(gallery), top=5)
for path, nearest, score in zip(query, order, scores, strict=False):
    print(path.name, "->", ", ".join(f"{gallery[i].name} {s:.2f}" for i, s in zip(nearest, score, strict=True)))

# %% [markdown]
# `open_index` embeds a folder and its sub-folders once, and after that only what is new. The names of these drawings begin
# with the person's number, so we can count how often the first answer is right.

# %%
index = dgnet.open_index(model, PEOPLE / "bounding_box_test", keep=OUT / "index")
answers = index.search(query, top=5)
right = [path.name[:4] == answer[0][0].name[:4] for path, answer in zip(query, answers, strict=True)]
print(f"{sum(right)} of {len(right)} first answers show the person of the query")

# %%
rows = [[path, *(hit for hit, _ in answer)] for path, answer in zip(query[:6], answers, strict=False)]
picture = Image.fromarray(
    np.vstack([np.hstack([np.asarray(Image.open(path).resize((64, 128))) for path in row]) for row in rows])
)
picture.save(OUT / "search.png")
print(f"queries on the left, their answers beside them: {OUT / 'search.png'}")
picture
