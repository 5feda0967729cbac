// @ts-check
// A table in typed arrays that forgets its oldest rows: fixed memory, found by time with a binary search.

export class Ring {
  /**
   * @param {number} capacity a power of two
   * @param {Record<string, any>} columns the array type of each; the column `t` (required) keeps the rows sorted
   */
  constructor(capacity, columns) {
    this.capacity = capacity;
    this.mask = capacity - 1;
    this.columns = {};
    for (const [name, Type] of Object.entries(columns)) this.columns[name] = new Type(capacity);
    this.names = Object.keys(columns);
    this.t = this.columns.t;
    /** Rows are numbered from the beginning of time; those from `head` up to before `tail` are held. */
    this.head = 0;
    this.tail = 0;
  }

  get size() {
    return this.tail - this.head;
  }

  clear() {
    this.head = this.tail;
  }

  /** Adds a row and returns its number. A row that comes late moves back to its place (seldom, and never far). */
  push(row) {
    if (this.size === this.capacity) this.head++;
    let number = this.tail++;
    while (number > this.head && this.t[(number - 1) & this.mask] > row.t) {
      const [from, to] = [(number - 1) & this.mask, number & this.mask];
      for (const name of this.names) this.columns[name][to] = this.columns[name][from];
      number--;
    }
    const at = number & this.mask;
    for (const name of this.names) this.columns[name][at] = row[name];
    return number;
  }

  /** The value of a row that is held. */
  get(name, number) {
    return this.columns[name][number & this.mask];
  }

  /** The first row whose t is at least (or, with `after`, above) this time; `tail` if there is none. */
  find(time, after = false) {
    let [low, high] = [this.head, this.tail];
    while (low < high) {
      const middle = Math.floor((low + high) / 2);
      const t = this.t[middle & this.mask];
      if (t < time || (after && t === time)) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** The last row whose t is not above this time; `head - 1` if there is none. */
  last(time) {
    return this.find(time, true) - 1;
  }

  /** Forgets the rows before this time. */
  forget(time) {
    this.head = this.find(time);
  }
}
