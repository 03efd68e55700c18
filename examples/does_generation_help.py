# %% [markdown]
# # Does generation help?
#
# A notebook as text: open it with Jupytext or an editor that knows `# %%` cells, or run
# `python examples/does_generation_help.py`. It compares a teacher with the DG-Net that started from it, on drawn people
# whom neither has seen. For several seeds, fair opponents and photographs see docs/results.md.

# %%
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path.cwd() if Path("dgnet.py").exists() else Path.cwd().parent
sys.path.insert(0, str(ROOT))

import dgnet
from mannequins.dataset import make_dataset

OUT = Path(tempfile.gettempdir()) / "dgnet-examples"
make_dataset(OUT / "people", seed=1, preset="many", train_ids=8, test_ids=48, distractors=20, junk=0)
teacher, model = dgnet.load("pretrained-teacher", device="cpu"), dgnet.load("pretrained", device="cpu")

# %% [markdown]
# `evaluate` returns what `test.py` writes: Rank-k, mAP and mINP by score setting, under both conventions.

# %%
for net in (teacher, model):
    for setting, conventions in dgnet.evaluate(net, OUT / "people")["tables"]["single query"].items():
        row = conventions["official"]
        print(f"{net.tested.title:34} {setting:16} Rank-1 {100 * row['rank1']:5.1f}   mAP {100 * row['mAP']:5.1f}")

# %% [markdown]
# What the id net can learn from a swap depends on whom it shows. We ask the teacher: among photographs of all people, is a
# swap nearer to the person whose clothes it wears, or to the person whose pose and body it has?

# %%
query, gallery = (sorted((OUT / "people" / folder).glob("*.jpg")) for folder in ("query", "bounding_box_test"))
gallery = [path for path in gallery if not path.name.startswith("0000")]
rng = np.random.default_rng(0)
clothes, bodies = (rng.choice(len(query), 200) for _ in range(2))
swaps = model.swap([query[i] for i in clothes], [query[i] for i in bodies])
order, _ = dgnet.rank(teacher.embed(swaps), teacher.embed(gallery), top=1)
nearest = np.array([gallery[i].name[:4] for i in order[:, 0]])
for what, side in (("clothes", clothes), ("body", bodies)):
    share = np.mean(nearest == np.array([query[i].name[:4] for i in side]))
    print(f"the nearest person is the one whose {what} it has: {100 * share:.0f} % of {len(swaps)} swaps")
