"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // Split and K: one choice for the whole page, shown by every selector.
  const choice = {};
  const choosers = [...document.querySelectorAll("[data-choose]")];
  const apply = () => {
    for (const chooser of choosers) {
      for (const input of chooser.querySelectorAll("input")) {
        input.checked = input.value === choice[chooser.dataset.choose];
      }
    }
    for (const panel of document.querySelectorAll("[data-split]")) {
      const { split, cutoff } = panel.dataset;
      panel.hidden =
        (choice.split !== undefined && split !== choice.split) ||
        (cutoff !== undefined && choice.cutoff !== undefined && cutoff !== choice.cutoff);
    }
  };
  for (const chooser of choosers) {
    const checked = chooser.querySelector("input:checked");
    if (checked) choice[chooser.dataset.choose] = checked.value;
    chooser.addEventListener("change", (event) => {
      choice[chooser.dataset.choose] = event.target.value;
      apply();
    });
  }

  // The sample of users. Text of the data goes through textContent only.
  const source = byId("sample-data");
  if (!source) return;
  const { towers, users, items } = JSON.parse(source.textContent);
  // the other half of the palette: the first colours mean models on this page
  const color = (index) => `c${(index + 3) % 6}`;
  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const drawing = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  const titleOf = (position) => {
    const [title, tags] = items[position];
    const made = element("span", "title", title);
    if (tags) made.append(element("span", "tags", tags));
    return made;
  };

  // Shares may be negative (a tower that speaks against the item): widths go by size.
  const towerBar = (shares) => {
    const total = shares.reduce((sum, share) => sum + Math.abs(share), 0);
    const made = element("span", "towers");
    if (!total) return made;
    const parts = shares.map((share) => Math.round((100 * Math.abs(share)) / total));
    const words = shares.map((share, index) => {
      return `${towers[index]} ${share.toFixed(3)} (${parts[index]} %)`;
    });
    const svg = drawing("svg", { width: "100%", height: 8, role: "img", "aria-label": words.join(", ") });
    let left = 0;
    shares.forEach((share, index) => {
      const width = (100 * Math.abs(share)) / total;
      const kind = `fill ${color(index)}${share < 0 ? " negative" : ""}`;
      const part = drawing("rect", { class: kind, x: `${left}%`, width: `${width}%`, height: 8 });
      const tip = drawing("title", {});
      tip.textContent = words[index] + (share < 0 ? ", counts against the item" : "");
      part.append(tip);
      svg.append(part);
      left += width;
    });
    const first = shares.reduce((best, share, index) => (share > shares[best] ? index : best), 0);
    made.append(svg, element("span", "", `${towers[first]} ${parts[first]} %`));
    return made;
  };

  const legend = () => {
    const list = element("ul", "legend");
    towers.forEach((tower, index) => {
      const entry = element("li");
      entry.append(element("span", `swatch ${color(index)}`), tower);
      list.append(entry);
    });
    return list;
  };

  const recommendations = (user) => {
    const part = element("div");
    part.append(element("h4", "", "Recommended"));
    if (!user.recommendations.length) {
      part.append(element("p", "note", "This user has not been scored."));
      return part;
    }
    if (towers.length) part.append(legend());
    const list = element("ol");
    user.recommendations.forEach(([item, score, shares], index) => {
      const entry = element("li", "recommendation");
      entry.append(element("span", "rank", index + 1), titleOf(item));
      const number = element("span", "score", score.toFixed(3));
      const count = items[item][2];
      number.title = "score" + (count === null ? "" : `; the item has ${plural(count, "train event")}`);
      entry.append(number, towerBar(shares));
      list.append(entry);
    });
    part.append(list);
    return part;
  };

  const past = (user) => {
    const part = element("div");
    part.append(element("h4", "", "History, latest first"));
    if (!user.history.length) {
      part.append(element("p", "note", "Nothing is known of this user."));
      return part;
    }
    const shown = user.history.length;
    const rest = user.events > shown ? `the last ${shown} of ${user.events}` : `all ${shown}`;
    part.firstChild.append(" ", element("span", "note", rest));
    const list = element("ol", "history");
    list.tabIndex = 0;
    list.setAttribute("aria-label", "History, latest first");
    for (const [item, date] of user.history) {
      const entry = element("li", "past");
      entry.append(titleOf(item), element("span", "date", date));
      list.append(entry);
    }
    part.append(list);
    return part;
  };

  const kinds = { cold: "cold user", new: "not in the dataset" };
  const show = (user) => {
    const person = element("article", "person");
    const head = element("h3", "", `User ${user.id}`);
    if (kinds[user.kind]) head.append(element("span", `badge ${user.kind}`, kinds[user.kind]));
    if (user.events !== null) head.append(element("span", "badge", plural(user.events, "event")));
    for (const fact of user.facts) head.append(element("span", "badge", fact));
    const lists = element("div", "lists");
    lists.append(recommendations(user), past(user));
    person.append(head, lists);
    byId("user").replaceChildren(person);
  };

  // What a search looks at, made once.
  const haystacks = users.map((user) => {
    const titles = [...user.history, ...user.recommendations].map(([item]) => items[item][0]);
    return [user.id, ...titles, ...user.facts].join("\n").toLowerCase();
  });
  const [search, select, previous, next] = ["search", "users", "previous", "next"].map(byId);
  let found = [];
  let place = 0;
  const refresh = () => {
    previous.disabled = place <= 0;
    next.disabled = place >= found.length - 1;
    select.value = String(found[place]);
    byId("position").textContent = found.length
      ? `${place + 1} of ${found.length}`
      : "Nobody here has that in their id or titles.";
    if (found.length) show(users[found[place]]);
    else byId("user").replaceChildren();
  };
  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    const current = found[place];
    found = users.map((_, index) => index).filter((index) => haystacks[index].includes(wanted));
    place = Math.max(0, found.indexOf(current));
    const marks = { cold: " (cold)", new: " (new)" };
    select.replaceChildren(
      ...found.map((index) => new Option(users[index].id + (marks[users[index].kind] || ""), index))
    );
    refresh();
  };
  search.addEventListener("input", filter);
  select.addEventListener("change", () => {
    place = Math.max(0, found.indexOf(Number(select.value)));
    refresh();
  });
  previous.addEventListener("click", () => { place -= 1; refresh(); });
  next.addEventListener("click", () => { place += 1; refresh(); });
  filter();
})();
