#include "known_plans.h"

#include <functional>
#include <mutex>

namespace divnorm {

namespace py = pybind11;

namespace {

constexpr size_t kMostEntries = 256;  // then all are dropped: the shapes of text have no end

// Keeps Python's object for as long as the plan is in use, by whichever thread.
std::shared_ptr<const Plan> held_by(const py::object& owner) {
  PyObject* object = py::object(owner).release().ptr();
  return {owner.cast<const Plan*>(), [object](const Plan*) {
            if (!Py_IsInitialized()) return;
            const py::gil_scoped_acquire acquired;
            Py_DECREF(object);
          }};
}

}  // namespace

CallKey::CallKey(std::string_view norm, std::string_view backend, const torch::View& x, bool residual)
    : norm(norm), backend(backend), x(x, residual) {}

bool CallKey::operator==(const CallKey& other) const {
  return x == other.x && norm == other.norm && backend == other.backend;
}

size_t CallKey::hash() const {
  const std::hash<std::string_view> hash;
  return (x.hash() * 31 + hash(norm)) * 31 + hash(backend);
}

std::shared_ptr<const Plan> KnownPlans::find(const CallKey& key) const {
  const size_t hash = key.hash();
  const std::shared_lock lock(mutex_);
  const auto found = entries_.find(hash);
  return found != entries_.end() && found->second->key == key ? found->second->plan : nullptr;
}

void KnownPlans::add(const CallKey& key, const py::object& owner) {
  auto entry = std::make_unique<Entry>(Entry{std::string(key.norm), std::string(key.backend), key, held_by(owner)});
  entry->key.norm = entry->norm;
  entry->key.backend = entry->backend;
  std::unique_ptr<const Entry> added = std::move(entry);
  decltype(entries_) dropped;  // outside the lock: what Python does for the last of a plan may come here again
  {
    const std::unique_lock lock(mutex_);
    if (entries_.size() >= kMostEntries) dropped.swap(entries_);
    std::swap(entries_[key.hash()], added);
  }
}

size_t KnownPlans::size() const {
  const std::shared_lock lock(mutex_);
  return entries_.size();
}

}  // namespace divnorm
