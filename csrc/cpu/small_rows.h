// Rows of few classes: as many rows side by side as a vector has lanes, one vector per class. Also rows of
// more classes that lie in planes, where a class of neighbouring rows is contiguous.

// ---- between rows in memory and one vector per class

// W x W in place, by exchanging ever smaller blocks.
template <typename T, int B = width<T> / 2>
DYNLOSS_ALWAYS_INLINE void transpose_square(Vec<T>* x) {
  if constexpr (B > 0) {
    unrolled<width<T>>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      if ((i & B) == 0) exchange<T, B>(x[i], x[i + B], std::make_index_sequence<width<T>>());
    });
    transpose_square<T, B / 2>(x);
  }
}

// One operand of a tile. Either class_stride (rows) or row_stride (planes) is 1.
template <typename S>
struct View {
  S* data;
  int64_t row_stride, class_stride;

  View(const Operand& operand, int64_t row)
      : data(static_cast<S*>(operand.data) + row * operand.row_stride),
        row_stride(operand.row_stride),
        class_stride(operand.class_stride) {}
  View(S* data, int64_t row_stride, int64_t class_stride)
      : data(data), row_stride(row_stride), class_stride(class_stride) {}
  S* at(int64_t row, int64_t class_index) const {
    return data + row * row_stride + class_index * class_stride;
  }
};

// Whole vectors are moved from the start of each row; what they hold beyond it is ignored.
template <typename T, typename S, int Classes>
DYNLOSS_ALWAYS_INLINE void load_tile(const View<S>& from, int64_t num_classes, Vec<T>* tile) {
  if (from.row_stride == 1) {
    for_classes<Classes>(num_classes,
                         [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA { tile[c] = load(from.at(0, c)); });
    return;
  }
  for (int64_t first = 0; first < num_classes; first += width<T>) {
    Vec<T> rows[width<T>];
    unrolled<width<T>>(
        [&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA { rows[i] = load(from.data + i * from.row_stride + first); });
    transpose_square<T>(rows);
    unrolled<width<T>>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      if (Classes == 0 || first + i < num_classes) tile[first + i] = rows[i];
    });
  }
}

// The same way back: with `overlap`, what a vector holds beyond its row is overwritten by the next.
template <typename T, typename S, int Classes>
DYNLOSS_ALWAYS_INLINE void store_tile(const View<S>& to, int64_t num_classes, const Vec<T>* tile,
                                      bool overlap) {
  if (to.row_stride == 1) {
    for_classes<Classes>(num_classes,
                         [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA { store(to.at(0, c), tile[c]); });
    return;
  }
  for (int64_t first = 0; first < num_classes; first += width<T>) {
    Vec<T> rows[width<T>];
    unrolled<width<T>>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA {
      rows[i] = Classes == 0 || first + i < num_classes ? tile[first + i] : Vec<T>{};
    });
    transpose_square<T>(rows);
    const int64_t count = num_classes - first;
    S* to_first = to.data + first;
    if (count >= width<T> || (overlap && num_classes <= width<T>))
      unrolled<width<T>>([&](int i)
                             DYNLOSS_ALWAYS_INLINE_LAMBDA { store(to_first + i * to.row_stride, rows[i]); });
    else
      for (int i = 0; i < width<T>; ++i)
        store_part<T, S>(to_first + i * to.row_stride, rows[i], static_cast<int>(count));
  }
}

// A tile that may not be moved by whole vectors, in planes of its own.
template <typename T, typename S>
struct Stage {
  S data[max_plane_classes * width<T>];

  View<S> view() { return {data, 1, width<T>}; }
  View<S> load(const View<S>& from, int rows, int64_t num_classes) {
    std::memset(data, 0, num_classes * width<T> * sizeof(S));
    for (int64_t c = 0; c < num_classes; ++c)
      for (int i = 0; i < rows; ++i) data[c * width<T> + i] = *from.at(i, c);
    return view();
  }
  void store(const View<S>& to, int rows, int64_t num_classes) const {
    for (int64_t c = 0; c < num_classes; ++c)
      for (int i = 0; i < rows; ++i) *to.at(i, c) = data[c * width<T> + i];
  }
};

// ---- the arithmetic of a tile

// What the rows of a block share.
template <typename T>
struct Shared {
  explicit Shared(const Block& block)
      : num_classes(block.num_classes),
        smooth(block.label_smoothing != 0),
        target(block.weights_sum, block.label_smoothing, block.num_classes),
        scale(static_cast<T>(block.scale)) {
    for (int64_t c = 0; c < num_classes; ++c) weights[c] = static_cast<T>(block.weights[c]);
  }
  int64_t num_classes;
  bool smooth;
  SharedTargetWeights<T> target;
  T scale;
  T weights[max_plane_classes];
};

// The rows of a tile and what is wanted of each.
template <typename T, typename S>
struct Tile {
  View<S> logits, u, v, out;
  Labels<T> labels;
  bool all_counted;
  bool overlap;
  Vec<T> scale;
};

// An ignored row counts for nothing, not even with a NaN.
template <typename T, typename S>
DYNLOSS_ALWAYS_INLINE void drop_ignored(const Tile<T, S>& tile, int64_t num_classes, Vec<T>* x) {
  if (tile.all_counted) return;
  for (int64_t c = 0; c < num_classes; ++c) x[c] = tile.labels.counted ? x[c] : Vec<T>{};
}

// What the loss and its derivatives need of the logits beside their exponentials.
template <typename T>
struct LogitSums {
  Vec<T> gamma_label{}, picked{}, smoothed{};
  RowSum<Vec<T>> exponentials{};  // along directions, all of it as others
};

// z becomes exp(z - top).
template <typename T, typename S, Kind K, int Classes>
DYNLOSS_ALWAYS_INLINE LogitSums<T> exponentiate(const Shared<T>& shared, const Tile<T, S>& tile, int64_t C,
                                                Vec<T>* z) {
  Vec<T> top = z[0];
  for_classes<Classes>(C, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA { top = maximum(z[c], top); });
  LogitSums<T> sums;
  for_classes<Classes>(C, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    const Mask<T> here = tile.labels.index == static_cast<Lane<T>>(c);
    const Vec<T> shifted = z[c] - top;
    sums.gamma_label = here ? broadcast(shared.weights[c]) : sums.gamma_label;
    if constexpr (has_loss_v<K>) {
      sums.picked = here ? shifted : sums.picked;
      if (shared.smooth) sums.smoothed += shared.weights[c] * shifted;
    }
    z[c] = exp_nonpositive(shifted);
    RowSum<Vec<T>>& sum = sums.exponentials;
    if constexpr (has_v_v<K>) {
      sum.others += z[c];
    } else {
      sum.label = here ? z[c] : sum.label;
      sum.others = here ? sum.others : sum.others + z[c];
    }
  });
  return sums;
}

// From the exponentials to the gradient.
template <typename T, typename S, int Classes>
DYNLOSS_ALWAYS_INLINE void differentiate(const Shared<T>& shared, const Tile<T, S>& tile,
                                         const RowGradient<Vec<T>>& gradient, int64_t C, Vec<T>* z) {
  for_classes<Classes>(C, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    Vec<T> x = gradient.of_softmax(z[c]);
    if (shared.smooth) x -= gradient.of_smoothing(shared.weights[c]);
    z[c] = tile.labels.index == static_cast<Lane<T>>(c) ? gradient.at_label : x;
  });
}

// From the exponentials to the products along v, or along u and v; `sum` is that of the exponentials.
template <typename T, typename S, Kind K, int Classes>
DYNLOSS_ALWAYS_INLINE void multiply(const Tile<T, S>& tile, const RowGradient<Vec<T>>& gradient, Vec<T> sum,
                                    int64_t C, Vec<T>* z) {
  constexpr int room = Classes > 0 ? Classes : max_plane_classes;
  constexpr bool third = K == Kind::third;
  InnerProducts<Vec<T>> products;
  Vec<T> v[room], u[third ? room : 1];
  load_tile<T, S, Classes>(tile.v, C, v);
  drop_ignored(tile, C, v);
  if constexpr (third) {
    load_tile<T, S, Classes>(tile.u, C, u);
    drop_ignored(tile, C, u);
  }
  for_classes<Classes>(C, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    const Mask<T> below = z[c] < 1.0f;
    products.v_top = below ? products.v_top : v[c];
    if constexpr (third) products.u_top = below ? products.u_top : u[c];
  });
  for_classes<Classes>(C, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    if constexpr (third)
      products.add(z[c], u[c], v[c]);
    else
      products.add(z[c], v[c]);
  });
  products.divide(sum);
  for_classes<Classes>(C, [&](int64_t c) DYNLOSS_ALWAYS_INLINE_LAMBDA {
    if constexpr (third)
      z[c] *= gradient.factor * products.factor(u[c], v[c]);
    else
      z[c] *= gradient.factor * products.factor(v[c]);
  });
}

// Writes what is wanted of the rows, and returns their losses.
template <typename T, typename S, Kind K, int Classes>
DYNLOSS_ALWAYS_INLINE Vec<T> run_tile(const Shared<T>& shared, const Tile<T, S>& tile) {
  const int64_t C = Classes > 0 ? Classes : shared.num_classes;
  Vec<T> z[Classes > 0 ? Classes : max_plane_classes];
  load_tile<T, S, Classes>(tile.logits, C, z);
  drop_ignored(tile, C, z);
  const LogitSums<T> sums = exponentiate<T, S, K, Classes>(shared, tile, C, z);
  const RowSum<Vec<T>>& sum = sums.exponentials;
  const TargetWeights<Vec<T>> q = shared.target.at(sums.gamma_label);
  if constexpr (has_output_v<K>) {
    const RowGradient<Vec<T>> gradient(tile.scale, q, sum);
    if constexpr (has_v_v<K>)
      multiply<T, S, K, Classes>(tile, gradient, sum.others, C, z);
    else
      differentiate<T, S, Classes>(shared, tile, gradient, C, z);
    drop_ignored(tile, C, z);
    store_tile<T, S, Classes>(tile.out, C, z, tile.overlap);
  }
  if constexpr (!has_loss_v<K>) return Vec<T>{};
  Vec<T> linear = q.on_label * sums.picked;
  if (shared.smooth) linear += shared.target.spread * sums.smoothed;
  const Vec<T> loss = row_loss(q.total, log_of_sum(sum.all(), sum.rest()), linear);
  return tile.all_counted ? loss : (tile.labels.counted ? loss : Vec<T>{});
}

// ---- the tiles of a chunk

// How many whole tiles of an operand may be moved by whole vectors without leaving rows [begin, end).
template <typename T>
int64_t whole_tiles(const Operand& operand, int64_t rows, int64_t num_classes) {
  if (operand.data == nullptr || operand.row_stride == 1) return rows / width<T>;
  // The last vector of a tile's last row ends `reach` elements after the tile's start.
  const int64_t padded = (num_classes + width<T> - 1) / width<T> * width<T>;
  const int64_t reach = (width<T> - 1) * operand.row_stride + padded;
  const int64_t size = (rows - 1) * operand.row_stride + num_classes;
  if (size < reach) return 0;
  return operand.row_stride == 0 ? rows / width<T> : (size - reach) / (width<T> * operand.row_stride) + 1;
}

template <typename T, typename S, Kind K, int Classes>
double run_small_rows(const Block& block, int64_t begin, int64_t end) {
  const Shared<T> shared(block);
  const int64_t C = block.num_classes, rows = end - begin;
  constexpr bool has_v = has_v_v<K>;
  int64_t whole = whole_tiles<T>(block.logits, rows, C);
  if (has_v) whole = std::min(whole, whole_tiles<T>(block.v, rows, C));
  if (K == Kind::third) whole = std::min(whole, whole_tiles<T>(block.u, rows, C));
  if (has_output_v<K>) whole = std::min(whole, whole_tiles<T>(block.out, rows, C));
  const int64_t whole_end = begin + whole * width<T>;
  Stage<T, S> logits, out;
  Stage<T, S> u, v;
  Vec<double> loss_sums{};
  int64_t last_labels[width<T>];
  for (int64_t row = begin; row < end; row += width<T>) {
    const int count = static_cast<int>(std::min<int64_t>(width<T>, end - row));
    const int64_t* labels = block.labels + row;
    if (count < width<T>) {
      std::fill(last_labels, last_labels + width<T>, block.ignore_index);
      labels = std::copy(labels, labels + count, last_labels) - count;
    }
    Tile<T, S> tile{{block.logits, row},
                    {block.u, row},
                    {block.v, row},
                    {block.out, row},
                    {labels, block.ignore_index},
                    count == width<T> && !block.any_ignored,
                    false,
                    {}};
    const View<S> result = tile.out;
    const bool staged = row >= whole_end;
    if (staged) {
      tile.logits = logits.load(tile.logits, count, C);
      if (has_v) tile.v = v.load(tile.v, count, C);
      if (K == Kind::third) tile.u = u.load(tile.u, count, C);
      tile.out = out.view();
    }
    // Not where the logits of the next rows are still to be read, nor into what lies between rows.
    tile.overlap = block.out.row_stride == C && !block.into_logits;
    tile.scale = broadcast(shared.scale);
    if (block.row_scale != nullptr)
      tile.scale *= load_part<T, T>(static_cast<const T*>(block.row_scale) + row, count, T(0));
    const Vec<T> loss = run_tile<T, S, K, Classes>(shared, tile);
    if (has_output_v<K> && staged) out.store(result, count, C);
    if constexpr (has_loss_v<K>) {
      if (block.row_loss != nullptr) store_part<T, S>(static_cast<S*>(block.row_loss) + row, loss, count);
      add_wide<T>(loss_sums, loss);
    }
  }
  return horizontal_sum<double>(loss_sums);
}
