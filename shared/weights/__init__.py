"""Weight versions: the bits of a state (state.py), the changes between two (patches.py), the store (store.py).

store = WeightStore("s3://bucket/run")
store.publish({FULL_FILE: content}, version=0, step=0)              # trainer
for link in store.chain(store.versions()[-1]):                      # replica
    store.fetch(link, folder)
"""
